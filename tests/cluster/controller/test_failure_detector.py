"""Detection of silent workers by the rhythm of their frames; the clock is moved by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from benchmarks.harness.members import member_of
from cluster.controller.settings import ControllerSettings
from cluster.core.frames import (
    Alive,
    Heartbeat,
    HeartbeatAck,
    LoadProgress,
    PeerLost,
    Register,
    Shutdown,
    WorkerReady,
)
from cluster.policy.silence import WINDOW_S
from tests.cluster.controller.fakes_cluster import BUILD, FakeCluster

pytestmark = pytest.mark.heavy

LIMIT_S = ControllerSettings().detection_limit_s
FORGOTTEN = round(10 * 2 * WINDOW_S) + 2
"""Gaps of 0.1 s after which nothing before them counts."""
HOSTS = {"attention-0": "head", "expert-0": "h-1", "expert-1": "h-2", "expert-2": "h-3"}
AWAY = ("expert-0", "expert-1", "expert-2")


def steady(gap_s: float = 0.1, count: int = FORGOTTEN, **cluster: object) -> FakeCluster:
    """A cluster that serves, and whose workers have shown their rhythm."""
    found = FakeCluster(1, 3, num_redundant=5, **cluster)  # type: ignore[arg-type]
    found.serve()
    for _ in range(count):
        found.tick(gap_s)
        say_alive(found)
    return found


def say_alive(cluster: FakeCluster, *but: str) -> None:
    """Signs of life of all workers that live, but some; every fifth is a heartbeat."""
    for record in cluster.known.workers:
        if record.is_lost or record.name in but:
            continue
        if round(10 * cluster.now) % 5:
            cluster.send(record.name, Alive())
        else:
            cluster.beat(record.name)


def passes(cluster: FakeCluster, seconds: float, *silent: str) -> list[str]:
    """Time passes in which some workers are silent; who is lost then."""
    for _ in range(round(seconds * 10)):
        cluster.tick(0.1)
        say_alive(cluster, *silent)
    return lost(cluster)


def lost(cluster: FakeCluster) -> list[str]:
    return [r.name for r in cluster.known.workers if r.is_lost]


def test_a_worker_with_a_steady_rhythm_is_lost_after_four_of_its_gaps() -> None:
    cluster = steady()
    assert passes(cluster, 0.4, "expert-1") == []
    assert passes(cluster, 0.1, "expert-1") == ["expert-1"]
    reason = cluster.known.workers["expert-1"].reason
    assert reason == "no sign of life for 0.5 s (limit 0.4 s)"


def test_every_frame_is_a_sign_of_life() -> None:
    cluster = steady()
    assert passes(cluster, 0.2, "expert-1") == []
    cluster.send("expert-1", LoadProgress(loaded_bytes=2, total_bytes=2))
    assert passes(cluster, 0.2, "expert-1") == []
    cluster.send("expert-1", LoadProgress(loaded_bytes=2, total_bytes=2))
    assert cluster.known.workers["expert-1"].gaps.patience_s == pytest.approx(0.5)
    assert passes(cluster, 0.4, "expert-1") == []
    assert passes(cluster, 0.2, "expert-1") == ["expert-1"]


@pytest.mark.parametrize("count", [1, round(10 * WINDOW_S) - 1])
def test_a_worker_whose_rhythm_is_unknown_has_the_whole_limit(count: int) -> None:
    cluster = steady(count=count, hosts=HOSTS)
    cluster.beat_all()
    assert passes(cluster, LIMIT_S, "expert-1") == []
    assert passes(cluster, 0.1, "expert-1") == ["expert-1"]
    assert cluster.known.workers["expert-1"].reason == "no sign of life for 2.1 s (limit 2 s)"


def test_a_worker_that_was_late_once_may_be_later() -> None:
    cluster = steady()
    assert passes(cluster, 0.2, "expert-1") == []
    cluster.tick(0.1)
    say_alive(cluster)  # 0.3 s: 0.2 s late
    assert cluster.controller.snapshot()["workers"][2]["patience_s"] == pytest.approx(0.9)
    assert passes(cluster, 0.8, "expert-1") == []
    assert passes(cluster, 0.2, "expert-1") == ["expert-1"]


def test_workers_of_one_host_share_their_gaps() -> None:
    """It is the machine that is busy."""
    cluster = steady(hosts={**HOSTS, "expert-1": "h-1"})
    passes(cluster, 0.3, "expert-0")
    cluster.tick(0.1)
    say_alive(cluster)  # 0.3 s late
    patience = {w["name"]: w["patience_s"] for w in cluster.controller.snapshot()["workers"]}
    assert patience == pytest.approx(
        {"attention-0": 0.4, "expert-0": 1.3, "expert-1": 1.3, "expert-2": 1.0}
    )
    assert passes(cluster, 1.2, "expert-1") == []
    assert passes(cluster, 0.2, "expert-1") == ["expert-1"]


def test_workers_beside_the_controller_that_are_late_together_are_not_lost() -> None:
    cluster = steady(hosts=dict.fromkeys(HOSTS, "head"))
    assert passes(cluster, 1.5, "expert-1", "expert-2") == []
    assert passes(cluster, 0.6, "expert-1", "expert-2") == ["expert-1", "expert-2"]


def starves(cluster: FakeCluster, seconds: float, name: str, share: float = 1.0) -> list[str]:
    """A worker is silent, and waits for a processor for a share of the time; who is lost then."""
    for _ in range(round(seconds * 10)):
        cluster.controller.detection.starved({name: 0.1 * share}, cluster.now)
        cluster.tick(0.1)
        say_alive(cluster, name)
    return lost(cluster)


def test_waits_for_a_processor_are_no_silence() -> None:
    cluster = steady(hosts=dict.fromkeys(HOSTS, "head"))
    assert starves(cluster, 5.0, "expert-1") == []
    assert passes(cluster, 0.3, "expert-1") == []
    assert passes(cluster, 0.2, "expert-1") == ["expert-1"]


def test_a_worker_that_also_sleeps_is_lost_later() -> None:
    cluster = steady(hosts=dict.fromkeys(HOSTS, "head"))
    assert starves(cluster, 0.7, "expert-1", share=0.5) == []
    assert starves(cluster, 0.4, "expert-1", share=0.5) == ["expert-1"]


def test_a_worker_may_not_starve_for_ever() -> None:
    cluster = steady(hosts=dict.fromkeys(HOSTS, "head"))
    hold_s = ControllerSettings().hold_limit_s
    assert starves(cluster, hold_s, "expert-1") == []
    assert starves(cluster, 1.0, "expert-1") == ["expert-1"]


def test_only_late_workers_of_this_host_are_suspects() -> None:
    cluster = steady(hosts={**HOSTS, "expert-0": "head"})
    for record in cluster.known.workers:
        record.member = replace(record.member, pid=7)
    suspects = cluster.controller.detection.suspects
    assert suspects(cluster.now + 0.2) == {}
    assert suspects(cluster.now + 0.3) == {"attention-0": 7, "expert-0": 7}


def test_after_a_loss_another_one_takes_the_whole_limit() -> None:
    """Recoveries keep machines busy: a first silence is weaker evidence then."""
    cluster = steady(hosts=HOSTS)
    cluster.controller.lost({"expert-2": "killed"}, cluster.now)
    cluster.join_all()
    assert passes(cluster, LIMIT_S - 0.1, "expert-1") == ["expert-2"]
    assert passes(cluster, 0.3, "expert-1") == ["expert-1", "expert-2"]


def test_a_worker_with_a_gpu_has_the_whole_limit() -> None:
    """The thread that sends its frames waits for a step now and then."""
    cluster = steady(count=0)
    cluster.known.workers["expert-1"].info = {"device": "cuda"}
    passes(cluster, FORGOTTEN / 10)
    cluster.beat_all()
    assert passes(cluster, LIMIT_S, "expert-1") == []
    assert passes(cluster, 0.1, "expert-1") == ["expert-1"]


def test_the_rhythm_counts_in_a_running_generation_only() -> None:
    """Worlds are built and experts are loaded while one forms: first times for many things."""
    cluster = steady()
    cluster.controller.lost({"expert-0": "killed"}, cluster.now)
    assert cluster.state == "RECOVERING"
    assert passes(cluster, LIMIT_S, "expert-1") == ["expert-0"]
    assert passes(cluster, 0.1, "expert-1") == ["expert-0", "expert-1"]


@pytest.mark.parametrize(("host", "is_lost"), [("h-1", True), ("h-2", False)])
def test_while_a_worker_loads_and_for_a_while_its_host_has_the_whole_limit(
    host: str, is_lost: bool
) -> None:
    """A start makes the machine busy, and much happens in a new worker for the first time."""
    cluster = steady(hosts=HOSTS)
    cluster.controller.lost({"expert-0": "killed"}, cluster.now)
    for name in HOSTS.keys() - {"expert-0"}:
        cluster.answer_loads(name)
    cluster.join_all()
    cluster.tick(0.1)
    member = member_of("expert-0.2", node=host, data_address="10.0.0.1:7")
    cluster.send("expert-0.2", Register(member=member, build=BUILD))
    passes(cluster, 0.5)
    cluster.send("expert-0.2", WorkerReady())
    cluster.join_all()
    passes(cluster, WINDOW_S - 0.5)
    assert cluster.state == "SERVING"
    assert passes(cluster, 1.2, "expert-1") == ["expert-0"] + ["expert-1"] * is_lost


def test_while_a_process_comes_whose_host_is_unknown_all_have_the_whole_limit() -> None:
    """It imports its packages, and has not called yet."""
    cluster = steady(hosts=HOSTS)
    cluster.controller.lost({"expert-0": "killed"}, cluster.now)
    for name in HOSTS.keys() - {"expert-0"}:
        cluster.answer_loads(name)
    cluster.join_all()
    cluster.tick(0.1)
    passes(cluster, 1.0, "expert-0.2")
    cluster.controller.created("expert-0.2", cluster.now)
    passes(cluster, 1.0, "expert-0.2")
    assert passes(cluster, 1.2, "expert-0.2", "expert-1") == ["expert-0"]


def test_a_sign_of_life_is_not_answered_and_renews_no_lease() -> None:
    cluster = steady()
    cluster.link.sent["expert-0"].clear()
    cluster.send("expert-0", Alive())
    assert cluster.link.sent["expert-0"] == []
    cluster.beat("expert-0")
    assert cluster.link.sent["expert-0"] == [HeartbeatAck(term=1)]


def test_a_lost_worker_renews_no_lease() -> None:
    cluster = steady()
    assert passes(cluster, 0.5, "expert-1") == ["expert-1"]
    cluster.link.sent["expert-1"].clear()
    cluster.send("expert-1", Heartbeat(progress=9, idle=True, generation=1, number=7))
    assert [type(f) for f in cluster.link.sent["expert-1"]] == [Shutdown]


# ---- pauses of the controller ---------------------------------------------------------------


@pytest.mark.parametrize("paused", [0.21, 0.4, 0.9, 30.0])
def test_a_pause_of_the_controller_is_no_silence(paused: float) -> None:
    cluster = steady()
    cluster.now += paused
    cluster.controller.tick(cluster.now)
    assert lost(cluster) == []
    assert passes(cluster, 0.1, "expert-1") == []
    assert passes(cluster, 0.4, "expert-1") == ["expert-1"]


@pytest.mark.parametrize("paused", [0.21, 0.9])
def test_frames_that_came_in_a_pause_of_the_controller_are_read_before_anyone_is_lost(
    paused: float,
) -> None:
    cluster = steady()
    passes(cluster, 0.4, "expert-1")
    cluster.now += paused
    cluster.controller.tick(cluster.now)
    assert lost(cluster) == []
    say_alive(cluster)
    assert passes(cluster, 0.1) == []


def test_many_short_pauses_of_the_controller_are_no_silence() -> None:
    cluster = steady()
    for _ in range(3):
        cluster.now += 0.25
        cluster.controller.tick(cluster.now)
    assert lost(cluster) == []
    for _ in range(3):
        cluster.now += 0.1
        cluster.controller.tick(cluster.now)
    assert len(lost(cluster)) == 4


def test_usual_lateness_of_the_controller_is_no_pause() -> None:
    """Else a busy controller would notice nothing."""
    cluster = steady()
    for _ in range(3):
        cluster.now += 0.19
        cluster.controller.tick(cluster.now)
    assert len(lost(cluster)) == 4


@pytest.mark.parametrize("ticks_first", [True, False])
@pytest.mark.parametrize("paused", [0.25, 0.9])
def test_a_pause_of_the_controller_is_no_gap_of_the_workers(
    paused: float, ticks_first: bool
) -> None:
    cluster = steady()
    cluster.now += paused
    if ticks_first:
        cluster.controller.tick(cluster.now)
    say_alive(cluster)
    cluster.controller.tick(cluster.now)
    assert max(r.gaps.patience_s for r in cluster.known.workers) == pytest.approx(0.4)
    assert passes(cluster, 0.5, "expert-1") == ["expert-1"]


# ---- the controller's host ------------------------------------------------------------------


def blip(cluster: FakeCluster, seconds: float, silent: Sequence[str] = AWAY) -> list[str]:
    return passes(cluster, seconds, *silent)


@pytest.mark.parametrize("seconds", [0.3, 0.4, 0.7, 1.4])
def test_a_short_blip_at_the_controllers_host_changes_nothing(seconds: float) -> None:
    cluster = steady(hosts=HOSTS)
    assert blip(cluster, seconds) == []
    assert passes(cluster, 1.0) == []
    assert cluster.known.generation.number == 1


def test_a_long_blip_replaces_no_worker() -> None:
    cluster = steady(hosts=HOSTS)
    assert blip(cluster, 3.5) == []
    assert passes(cluster, 0.2) == []
    assert cluster.known.generation.number == 2  # steps may have stopped
    assert cluster.link.ended == []


def test_reports_in_a_blip_are_void() -> None:
    cluster = steady(hosts=HOSTS)
    assert blip(cluster, 1.2) == []
    cluster.send("attention-0", PeerLost(worker="expert-1", generation=1, reason="silent"))
    assert blip(cluster, 0.4) == []
    assert passes(cluster, 0.5) == []
    assert cluster.known.generation.number == 2


def test_workers_with_other_rhythms_fall_silent_together() -> None:
    """The first to be suspected is not lost when the others, who are given more time, are silent,
    too."""
    cluster = steady(hosts=HOSTS)
    passes(cluster, 0.3, "expert-1", "expert-2")
    cluster.tick(0.1)
    say_alive(cluster)  # these two may be silent for 1.3 s now
    assert blip(cluster, 1.7) == []
    assert passes(cluster, 0.5) == []


def test_one_silent_host_of_three_is_lost() -> None:
    cluster = steady(hosts=HOSTS)
    assert blip(cluster, 1.0, ["expert-1"]) == []  # a segment may be lost twice on its way
    assert blip(cluster, 0.1, ["expert-1"]) == ["expert-1"]


def test_a_late_host_saves_a_silent_one_for_a_moment_only() -> None:
    cluster = steady(hosts=HOSTS)
    passes(cluster, 0.4, "expert-0")
    assert passes(cluster, 0.7, "expert-0", "expert-1") == []
    assert passes(cluster, 1.1, "expert-0") == ["expert-0"]
