"""What workers report of parts that do not work, and what they learn of the places."""

from __future__ import annotations

from msgspec.structs import replace

from cluster.core.frames import ControllerSnapshot, NewGeneration
from tests.cluster.controller.fakes_cluster import FakeCluster
from tests.cluster.controller.test_host_disks import HEARTBEAT


def test_the_status_has_what_a_worker_reported_last() -> None:
    cluster = FakeCluster(1, 2)
    cluster.serve()
    version, problem = cluster.known.version, "attention-0 keeps no KV blocks on disk: broken"
    cluster.send("attention-0", replace(HEARTBEAT, problems=(problem,)))
    assert cluster.known.version > version, "gateways learn of it"
    assert cluster.controller.snapshot()["problems"] == [problem]
    version = cluster.known.version
    cluster.send("attention-0", replace(HEARTBEAT, problems=(problem,)))
    assert cluster.known.version == version
    cluster.send("attention-0", HEARTBEAT)
    assert cluster.controller.snapshot()["problems"] == []


def test_workers_know_the_places_of_the_cluster() -> None:
    """They delete what they keep on disk for places that are gone."""
    cluster = FakeCluster(2, 1)
    cluster.serve()
    places = {"attention-0", "attention-1", "expert-0"}
    order = cluster.link.last("attention-0", NewGeneration)
    assert order is not None
    assert {*order.places} == places
    cluster.known.send_snapshot()
    snapshot = cluster.link.last("attention-0", ControllerSnapshot)
    assert snapshot is not None
    assert {*snapshot.places} == places
