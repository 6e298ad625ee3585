"""Traces of what happens to the cluster."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import pytest

from cluster.cluster_traces import ClusterTraces, trace_cluster
from cluster.config import ObservabilitySection
from cluster.spans import Span
from tests.cluster.test_controller_recovery import lose
from tests.cluster.test_rebalancing import SKEWED, make, obey, status, window
from tests.fakes_cluster import FakeCluster


class Kept:
    """Keeps spans."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def send(self, span: Span, headers: Mapping[str, Sequence[str]] | None = None) -> None:
        """See ``Exporter``."""
        assert headers is None
        self.spans.append(span)

    def stop(self, limit_s: float) -> None:
        """See ``Exporter``."""


def followed(cluster: FakeCluster) -> list[Span]:
    """The spans of what happens from now on."""
    kept = Kept()
    ClusterTraces(kept).follow(cluster.controller)
    return kept.spans


def test_a_rebalancing_tells_what_it_moved_and_what_it_promises() -> None:
    cluster = make()
    spans = followed(cluster)
    window(cluster, SKEWED)
    obey(cluster)
    last = status(cluster)["last"]
    migration, rebalance = spans
    assert migration.name == "expertmesh.migration"
    moved = {"expertmesh.slots": last["slots_moved"], "expertmesh.bytes": last["bytes"]}
    assert migration.attributes == {"expertmesh.reason": "rebalance", **moved}
    assert rebalance.name == "expertmesh.rebalance"
    assert rebalance.attributes == {
        "expertmesh.outcome": "applied",
        "expertmesh.placement_epoch": cluster.controller.placement.epoch,
        "expertmesh.balancedness.before": last["balancedness"]["before"],
        "expertmesh.balancedness.predicted": last["balancedness"]["predicted"],
        **moved,
    }
    assert not rebalance.error
    assert rebalance.ended_ns - rebalance.began_ns == round(last["seconds"] * 1e9)


def test_a_rebalancing_that_fails_says_so() -> None:
    cluster = make()
    spans = followed(cluster)
    window(cluster, SKEWED)
    cluster.controller.disconnected("expert-3", "reset", cluster.now)
    cluster.tick(0.2)
    (rebalance,) = (span for span in spans if span.name == "expertmesh.rebalance")
    assert rebalance.error == "failed"


def test_a_recovery_lasts_from_the_loss_until_steps_run_again() -> None:
    cluster = FakeCluster(1, 3)
    cluster.serve()
    spans = followed(cluster)
    lose(cluster, "expert-1")
    cluster.join_all(highest_step=6)
    cluster.now += 0.5
    cluster.answer_loads("expert-0")
    cluster.answer_loads("expert-2")
    *migrations, recovery = spans
    assert [span.attributes["expertmesh.reason"] for span in migrations] == ["recovery"] * 2
    assert recovery.name == "expertmesh.recovery"
    assert recovery.attributes == {"expertmesh.lost_workers": ["expert-1"]}
    assert recovery.ended_ns - recovery.began_ns == 500_000_000


def test_a_controller_without_the_packages_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cluster.span_export", None)
    section = ObservabilitySection(otlp_endpoint="http://127.0.0.1:4317")
    assert trace_cluster(FakeCluster(1, 2).controller, section) is None
    assert trace_cluster(FakeCluster(1, 2).controller, ObservabilitySection()) is None
