"""Workers for which steps wait, in the controller's snapshot."""

from __future__ import annotations

import itertools

from tests.cluster.controller.fakes_cluster import FakeCluster


def _serving() -> FakeCluster:
    cluster = FakeCluster(1, 2)
    cluster.serve()
    return cluster


def _late(cluster: FakeCluster) -> list[str]:
    late: list[str] = cluster.controller.snapshot()["late_workers"]
    return late


def _beat(cluster: FakeCluster, stalled_s: float | None) -> None:
    """Heartbeats in which the attention worker waits for expert-1."""
    cluster.beat("attention-0", stalled_s=stalled_s, waits_for=("expert-1",))
    cluster.beat_all("attention-0")
    cluster.tick(0.1)


def test_a_stall_is_in_the_snapshot_until_steps_commit() -> None:
    cluster = _serving()
    versions = [cluster.known.version]
    for stalled_s, late in ((0.0, []), (1.0, ["expert-1"]), (1.5, ["expert-1"]), (0.0, [])):
        _beat(cluster, stalled_s)
        assert _late(cluster) == late
        versions.append(cluster.known.version)
    assert [b - a for a, b in itertools.pairwise(versions)] == [0, 1, 0, 1]
    assert cluster.state == "SERVING"


def test_a_stall_is_a_problem_that_people_see() -> None:
    cluster = _serving()
    _beat(cluster, 1.0)
    assert cluster.controller.snapshot()["problems"] == ["steps wait for expert-1"]
    _beat(cluster, None)
    assert cluster.controller.snapshot()["problems"] == []


def test_a_new_generation_begins_without_a_stall() -> None:
    cluster = FakeCluster(1, 2, num_redundant=4)
    cluster.serve()
    _beat(cluster, 1.0)
    cluster.disconnect("expert-1")
    cluster.tick(0.1)
    assert _late(cluster) == []
    cluster.join("attention-0")
    cluster.join("expert-0")
    cluster.tick(0.1)
    assert (cluster.state, _late(cluster)) == ("DEGRADED", [])


def test_a_generation_that_takes_long_to_form_waits_for_members_by_name() -> None:
    cluster = FakeCluster(1, 3, num_redundant=4)
    cluster.serve()
    cluster.disconnect("expert-2")
    cluster.join("attention-0")
    cluster.tick(0.3)
    cluster.beat_all()
    assert (cluster.state, _late(cluster)) == ("RECOVERING", [])
    cluster.tick(0.4)
    assert _late(cluster) == ["expert-0", "expert-1"]
    cluster.join("expert-0")
    cluster.tick(0.1)
    assert _late(cluster) == ["expert-1"]


def test_a_pause_of_the_controller_is_no_silence_of_the_workers() -> None:
    cluster = _serving()
    cluster.beat_all()
    cluster.now += 1.9
    cluster.controller.tick(cluster.now)
    assert _late(cluster) == []
