"""New workers that join a cluster that serves: they must not keep the others from running."""

from __future__ import annotations

import pytest

from cluster.config.cluster import ClusterConfig
from cluster.config.transport import TransportSection
from cluster.config.workers import WorkersSection
from cluster.controller.settings import ControllerSettings
from cluster.core.frames import LoadExperts, PeerLost, StatusReply
from tests.cluster.controller.fakes_cluster import CONFIG, FakeCluster
from tests.cluster.controller.load_reports import make_report

OLD = ("attention-0", "expert-0", "expert-2")


def joining(num_redundant: int = 8) -> FakeCluster:
    """A generation with ``expert-1.2``, in which ``expert-1`` was lost before, is announced."""
    cluster = FakeCluster(1, 3, num_redundant=num_redundant)
    cluster.serve()
    cluster.disconnect("expert-1")
    for name in OLD:
        cluster.answer_loads(name)
    cluster.join_all()
    cluster.tick(0.1)
    cluster.bring_up("expert-1.2")
    assert [m.name for m in cluster.known.generation.members] == [*OLD, "expert-1.2"]
    return cluster


def wait(cluster: FakeCluster, seconds: float, behind: int = 0) -> None:
    """Time passes; all are heard, the attention worker in a generation ``behind`` the newest."""
    for _ in range(round(2 * seconds)):
        cluster.tick(0.5)
        cluster.beat_all("attention-0")
        cluster.beat("attention-0", behind=behind)


def members(cluster: FakeCluster) -> list[str]:
    return [m.name for m in cluster.known.generation.members]


def test_a_worker_that_does_not_join_stops_the_others_no_longer_than_two_detection_limits() -> None:
    cluster = joining()
    cluster.join("expert-0")
    cluster.join("expert-2")  # the attention worker waits for the new one
    wait(cluster, 4.0)
    assert "expert-1.2" in members(cluster)
    cluster.tick(0.2)
    assert members(cluster) == list(OLD)
    assert cluster.link.ended == ["expert-1", "expert-1.2"]
    cluster.join_all()
    assert cluster.state == "DEGRADED"


def test_what_the_others_have_freed_for_a_new_worker_is_loaded_after_its_loss() -> None:
    """It has run with them, and their slots hold its experts no more, or not for long."""
    cluster = joining(num_redundant=0)
    cluster.join_all()
    assert cluster.state == "SERVING"
    cluster.disconnect("expert-1.2")
    assert sum(cluster.answer_loads(name) for name in OLD) > 0


def test_a_worker_may_join_while_a_member_has_not_ended_its_step() -> None:
    cluster = joining()
    cluster.join("expert-0")
    cluster.join("expert-2")
    wait(cluster, 8.0, behind=1)
    assert "expert-1.2" in members(cluster)
    wait(cluster, 0.5)
    cluster.join_all()
    assert cluster.state == "SERVING"


def test_a_new_worker_that_has_waited_for_a_long_step_waits_again() -> None:
    """It gives up after a while, and nobody is at fault."""
    cluster = joining()
    cluster.join("expert-0")
    cluster.join("expert-2")
    wait(cluster, 10.0, behind=1)
    number = cluster.known.generation.number
    report = PeerLost(worker="attention-0", generation=number, reason="no edge within 10 s")
    cluster.send("expert-1.2", report)
    assert cluster.known.generation.number == number + 1
    wait(cluster, 8.0, behind=2)
    cluster.join_all()
    assert cluster.state == "SERVING"
    assert cluster.link.ended == ["expert-1"]


def test_members_of_a_generation_that_nobody_joins_have_the_longer_limit() -> None:
    cluster = joining()
    cluster.join_all()
    cluster.disconnect("expert-2")
    wait(cluster, 14.0)
    assert members(cluster) == ["attention-0", "expert-0", "expert-1.2"]


def test_two_that_cannot_join_stop_the_others_no_longer_than_one() -> None:
    cluster = FakeCluster(1, 4, num_redundant=24)
    cluster.serve()
    cluster.controller.lost({"expert-0": "reset", "expert-1": "reset"}, cluster.now)
    cluster.join_all()
    cluster.tick(0.1)
    cluster.disconnect("expert-3")
    cluster.bring_up("expert-0.2")
    cluster.bring_up("expert-1.2")
    cluster.join_all()  # those who were ready join now
    assert members(cluster) == ["attention-0", "expert-2", "expert-0.2", "expert-1.2"]
    number = cluster.known.generation.number
    cluster.join("expert-2")
    wait(cluster, 2.0)
    cluster.send("attention-0", PeerLost(worker="expert-0.2", generation=number, reason="silent"))
    wait(cluster, 0.5)
    assert members(cluster) == ["attention-0", "expert-2", "expert-1.2"]
    cluster.join("expert-2")
    wait(cluster, 2.0)
    assert members(cluster) == ["attention-0", "expert-2"]


def test_who_joins_is_lost_rather_than_who_serves() -> None:
    """No other worker has the experts that the maps name there from now on."""
    cluster = joining(num_redundant=0)
    number = cluster.known.generation.number
    cluster.send("expert-1.2", PeerLost(worker="expert-0", generation=number, reason="silent"))
    cluster.beat_all()
    cluster.tick(0.3)
    assert cluster.link.ended == ["expert-1", "expert-1.2"]


def test_who_has_joined_is_as_good_as_the_others() -> None:
    """Of a path that breaks later the expert worker is lost, which holds no request."""
    cluster = FakeCluster(2, 3, num_redundant=16)
    cluster.serve()
    cluster.disconnect("attention-0")
    cluster.join_all()
    cluster.tick(0.1)
    cluster.bring_up("attention-0.2")
    cluster.join_all()
    assert cluster.state == "SERVING"
    number = cluster.known.generation.number
    cluster.send("expert-0", PeerLost(worker="attention-0.2", generation=number, reason="silent"))
    cluster.tick(0.3)
    assert cluster.link.ended == ["attention-0", "expert-0"]


def test_the_others_load_nothing_when_a_worker_cannot_join() -> None:
    """They hold what they served with before, although another load would be spread otherwise."""
    cluster = joining(num_redundant=0)
    cluster.send(
        "attention-0",
        StatusReply(token=0, expert_load=make_report(99, [1, 1, 1, 9, 50, 99, 1, 1])),
    )
    cluster.disconnect("expert-1.2")
    orders = [f for sent in cluster.link.sent.values() for f in sent if isinstance(f, LoadExperts)]
    assert orders == []
    cluster.join_all()
    assert cluster.state == "DEGRADED"


def test_a_worker_that_comes_again_after_a_failed_join_brings_its_copies() -> None:
    cluster = joining(num_redundant=0)
    cluster.disconnect("expert-2")
    for name in ("attention-0", "expert-0", "expert-1.2"):
        cluster.answer_loads(name)
    cluster.join_all()
    assert cluster.state == "DEGRADED"
    for desired, found in zip(
        cluster.known.desired.banks, cluster.known.placement.banks, strict=True
    ):
        assert set(desired.physical_to_logical[1]) <= set(found.physical_to_logical[1])


@pytest.mark.parametrize(
    ("transport", "device", "gpus", "limit_s"),
    [
        ("auto", "cpu", 0.0, 4.0),
        ("sockets", "cuda", 1.0, 4.0),
        ("auto", "cuda", 0.5, 4.0),
        ("auto", "cuda", 1.0, 15.0),
        ("collective", "cpu", 0.0, 15.0),
    ],
)
def test_a_world_takes_longer_to_build_than_edges(
    transport: str, device: str, gpus: float, limit_s: float
) -> None:
    config = ClusterConfig(
        model=CONFIG.model,
        workers=WorkersSection(device=device, gpus_per_worker=gpus),  # type: ignore[arg-type]
        transport=TransportSection(transport=transport),  # type: ignore[arg-type]
    )
    assert ControllerSettings.of(config).join_limit_s == limit_s
