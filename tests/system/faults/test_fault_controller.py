"""The controller dies or freezes, alone or with a worker, while streams are under way."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator

import psutil
import pytest

from tests.harness.fault_rows import (
    DETECTION_LIMIT_S,
    FORMS,
    Form,
    play,
    row_config,
    state_of,
    stop_until_lost,
)
from tests.harness.serving_cluster import RayCluster, ServingCluster, connected_ray, serving

pytestmark = pytest.mark.ray

LIMIT_S = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[ServingCluster]:
    """Four expert workers that each hold every expert: any three of them may be lost."""
    config = row_config(1, 4, num_redundant=3 * 64)
    with connected_ray(), serving(RayCluster(config)) as made:
        yield made


def kill_controller(cluster: ServingCluster) -> None:
    """``kill -9``."""
    os.kill(cluster.snapshot()["controller_pid"], signal.SIGKILL)


def one_that_serves(cluster: ServingCluster) -> str:
    """Name of an expert worker in the running generation."""
    workers = cluster.snapshot()["workers"]
    return max(str(w["name"]) for w in workers if w["role"] == "expert" and w["state"] == "SERVING")


@pytest.mark.parametrize("form", FORMS)
def test_nobody_misses_a_killed_controller(cluster: ServingCluster, form: Form) -> None:
    before = cluster.snapshot()
    play(cluster, form, random.Random(1), lambda: kill_controller(cluster))
    after = cluster.wait(lambda s: s["term"] > before["term"])
    assert after["generation"] == before["generation"]
    assert after["state"] == before["state"]
    assert after["history"][-1]["effect"] == "all members went on"


@pytest.mark.parametrize("form", FORMS)
def test_a_controller_that_wakes_up_blames_nobody(cluster: ServingCluster, form: Form) -> None:
    before = cluster.snapshot()
    pid = before["controller_pid"]
    wake = threading.Timer(DETECTION_LIMIT_S + 1.0, os.kill, (pid, signal.SIGCONT))

    def freeze() -> None:
        os.kill(pid, signal.SIGSTOP)
        wake.start()

    play(cluster, form, random.Random(2), freeze)
    wake.join()
    after = cluster.snapshot(fresh=True)
    for key in ("controller_pid", "term", "generation", "state"):
        assert after[key] == before[key], key


@pytest.mark.parametrize("form", FORMS)
def test_a_controller_and_a_worker_die_together(cluster: ServingCluster, form: Form) -> None:
    before, name = cluster.snapshot(), one_that_serves(cluster)
    pids = [before["controller_pid"], cluster.worker(name)["pid"]]

    def kill_both() -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    play(cluster, form, random.Random(3), kill_both)
    after = cluster.wait(lambda s: s["term"] > before["term"] and s["state"] != "RECOVERING")
    assert state_of(after, name) == "LOST"
    assert after["generation"] > before["generation"]
    assert after["experts_complete"]


@pytest.mark.parametrize("form", FORMS)
def test_an_expert_worker_that_wakes_up_late_disturbs_nobody(
    cluster: ServingCluster, form: Form
) -> None:
    before, name = cluster.snapshot(), one_that_serves(cluster)
    process = psutil.Process(cluster.worker(name)["pid"])
    play(cluster, form, random.Random(4), lambda: stop_until_lost(cluster, name))
    after = cluster.wait(lambda s: s["state"] != "RECOVERING")
    assert after["generation"] > before["generation"]
    assert after["experts_complete"]
    psutil.wait_procs([process], LIMIT_S)
    assert not process.is_running()
