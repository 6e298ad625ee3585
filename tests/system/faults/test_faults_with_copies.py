"""Every expert has a second copy: workers die, stop or leave, and no client notices.

One cluster of real actors plays all rows, each from a whole cluster on: so every row also shows
that the one before was made good.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from benchmarks.faults.layouts import DETECTION_LIMIT_S, row_config
from benchmarks.harness.serving_cluster import RayCluster, ServingCluster, connected_ray, serving
from tests.harness.fault_rows import (
    FORMS,
    SMALL,
    Form,
    Played,
    check_gone,
    entries_since,
    kill,
    play,
    play_until,
    serving_name,
    stop_until_lost,
    wait_operation,
    whole,
)
from tests.harness.foreign_sockets import hang_up
from tests.harness.tiers import quick_rows

pytestmark = [pytest.mark.ray, pytest.mark.parametrize("form", FORMS)]


@pytest.fixture(scope="module")
def shared() -> Iterator[ServingCluster]:
    with connected_ray(), serving(RayCluster(row_config(2, 3, num_redundant=22))) as made:
        yield made


@pytest.fixture
def cluster(shared: ServingCluster) -> ServingCluster:
    """Whole."""
    whole(shared)
    return shared


def is_calm(played: Played) -> bool:
    """No other worker may have been lost."""
    return played.is_calm


def test_no_stream_notices_a_killed_controller(cluster: ServingCluster, form: Form) -> None:
    before: dict[str, Any] = {}

    def fault() -> None:
        before.update(cluster.snapshot())
        os.kill(before["controller_pid"], signal.SIGKILL)

    play_until(cluster, form, random.Random(1), fault, is_calm)
    after = cluster.wait(lambda s: s["term"] > before["term"])
    assert after["generation"] == before["generation"]
    assert after["state"] == before["state"]
    assert after["history"][-1]["effect"] == "all members continued"


@pytest.mark.slow
def test_a_broken_connection_to_the_controller_costs_no_worker(
    cluster: ServingCluster, form: Form
) -> None:
    before: dict[str, Any] = {}

    def fault() -> None:
        before.update(cluster.snapshot())
        worker = cluster.worker(serving_name(cluster, "expert", 0))
        hang_up(before["controller_pid"], worker["pid"])

    play_until(cluster, form, random.Random(3), fault, is_calm)
    after = cluster.wait(lambda s: s["term"] > before["term"])
    assert after["generation"] == before["generation"]
    pids = [{w["name"]: w["pid"] for w in s["workers"]} for s in (before, after)]
    assert pids[0] == pids[1]


def test_a_controller_that_wakes_up_declares_no_worker_lost(
    cluster: ServingCluster, form: Form
) -> None:
    before: dict[str, Any] = {}

    def freeze() -> None:
        before.update(cluster.snapshot())
        pid = before["controller_pid"]
        wake = threading.Timer(DETECTION_LIMIT_S + 1.0, os.kill, (pid, signal.SIGCONT))
        os.kill(pid, signal.SIGSTOP)
        wake.start()

    play_until(cluster, form, random.Random(2), freeze, is_calm)
    after = cluster.snapshot(fresh=True)  # answers once it has woken up
    for key in ("controller_pid", "term", "generation", "state"):
        assert after[key] == before[key], key


def test_a_worker_with_experts_is_killed(cluster: ServingCluster, form: Form) -> None:
    """Its steps are run again with the copies; no weight is read for that."""
    before = cluster.snapshot()
    draw = random.Random(3)

    def fault() -> None:
        kill(cluster, serving_name(cluster, "expert", draw.randrange(3)))

    play_until(cluster, form, draw, fault, lambda p: p.is_calm and p.num_retried > 0)
    history = entries_since(before, whole(cluster))
    loss = next(entry for entry in history if entry["cause"].startswith("lost expert"))
    assert loss["effect"].startswith("continue with 2 attention and 2 expert workers")
    assert any("is ready" in entry["cause"] for entry in history)


@pytest.mark.parametrize(
    "rank",
    quick_rows({0}, [0, 1]),
    ids=["leader", "other"],
)
def test_an_attention_worker_is_killed(cluster: ServingCluster, form: Form, rank: int) -> None:
    """Its requests go on elsewhere."""
    before = cluster.snapshot()

    def fault() -> None:
        kill(cluster, serving_name(cluster, "attention", rank))

    play_until(cluster, form, random.Random(rank), fault, lambda played: played.num_resubmitted > 0)
    history = entries_since(before, whole(cluster))
    assert any("lost attention" in entry["cause"] for entry in history)


def test_a_controller_and_a_worker_die_together(cluster: ServingCluster, form: Form) -> None:
    before, name = cluster.snapshot(), serving_name(cluster, "expert", 2)

    def kill_both() -> None:
        pids = [before["controller_pid"], cluster.worker(name)["pid"]]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    play(cluster, form, random.Random(4), kill_both)
    after = cluster.wait(lambda s: s["generation"] > before["generation"])
    assert after["term"] > before["term"]
    assert cluster.worker(name)["state"] == "LOST"
    assert whole(cluster)["experts_complete"]


@pytest.mark.parametrize("role", quick_rows({"expert"}, ["attention", "expert"]))
def test_a_worker_that_wakes_up_late_disturbs_no_stream(
    cluster: ServingCluster, form: Form, role: str
) -> None:
    before, name = cluster.snapshot(), serving_name(cluster, role, 0)
    pid = cluster.worker(name)["pid"]
    play(cluster, form, random.Random(5), lambda: stop_until_lost(cluster, name))
    cluster.wait(lambda s: s["generation"] > before["generation"])
    # Whichever of the two rules of silence comes first: see cluster/policy/failure.py.
    reason = cluster.worker(name)["reason"]
    assert "no sign of life" in reason or "has stalled" in reason
    check_gone(pid)


def test_a_signal_to_a_worker_drains_it(cluster: ServingCluster, form: Form) -> None:
    names: list[str] = []
    known: set[str] = set()

    def fault() -> None:
        names[:] = [serving_name(cluster, "attention", 1), serving_name(cluster, "expert", 2)]
        known.update(operation["id"] for operation in cluster.call("operations"))
        for name in names:  # as the processes of a node get it
            os.kill(cluster.worker(name)["pid"], signal.SIGTERM)

    before = cluster.snapshot()["generation"]
    play_until(cluster, form, random.Random(6), fault, is_calm)
    for name in names:
        check_gone(cluster.worker(name)["pid"])
    # one, unless a signal was followed much later
    begun = [o["id"] for o in cluster.call("operations") if o["id"] not in known]
    ended = [wait_operation(cluster, operation) for operation in begun]
    assert {operation["state"] for operation in ended} == {"SUCCEEDED"}, ended
    targets = " and ".join(operation["target"] for operation in ended)
    assert sorted(targets.split(" and ")) == names
    assert all(operation["generation"] > before for operation in ended)


@pytest.mark.parametrize("end", quick_rows({0}, [0, 1]), ids=["source", "target"])
def test_a_worker_is_killed_while_requests_move(
    cluster: ServingCluster, form: Form, end: int
) -> None:
    """The worker that they leave, or the one that they move to; the drain may fail."""
    draw = random.Random(f"killed {end}")
    num_killed = 0
    for _ in range(1 if form is SMALL else 8):
        whole(cluster)
        ends = [serving_name(cluster, "attention", rank) for rank in draw.sample([0, 1], 2)]

        def fault(ends: list[str] = ends) -> None:
            nonlocal num_killed
            pid = cluster.worker(ends[end])["pid"]
            cluster.call("begin", "drain", {"worker": ends[0], "limit_s": 60.0})
            time.sleep(draw.uniform(0.0, 0.25))  # anywhere in the moves of a few requests
            with suppress(ProcessLookupError):  # all may have moved, and the worker be gone
                os.kill(pid, signal.SIGKILL)
                num_killed += 1

        play(cluster, form, draw, fault)
        for operation in cluster.call("operations"):
            wait_operation(cluster, operation["id"])
    assert num_killed, "no worker was killed while it had requests"
    whole(cluster)
