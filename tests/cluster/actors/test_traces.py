"""Traces of what happens to the cluster."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode

from cluster.config.observability import ObservabilitySection
from cluster.tracing.exporter import start_traces
from tests.cluster.controller.fakes_cluster import CONFIG, FakeCluster
from tests.cluster.controller.test_controller_recovery import lose
from tests.cluster.controller.test_rebalancing import SKEWED, make, obey, status, window
from tests.harness.kept_spans import KeptSpans, times_ns


def followed(cluster: FakeCluster) -> KeptSpans:
    """The spans of what happens from now on."""
    kept = KeptSpans()
    cluster.link.on_trace = lambda t: kept.export.record(
        t.name, t.seconds, t.attributes, t.error, t.span_id
    )
    return kept


def length_ns(span: ReadableSpan) -> int:
    """How long it took."""
    began_ns, ended_ns = times_ns(span)
    return ended_ns - began_ns


def test_a_rebalancing_reports_what_it_moved_and_predicts() -> None:
    cluster = make()
    kept = followed(cluster)
    window(cluster, SKEWED)
    obey(cluster)
    last = status(cluster)["last"]
    migration, rebalance = kept.spans
    assert migration.name == "expertmesh.migration"
    moved = {"expertmesh.slots": last["slots_moved"], "expertmesh.bytes": last["bytes"]}
    assert migration.attributes == {"expertmesh.reason": "rebalance", **moved}
    assert rebalance.name == "expertmesh.rebalance"
    assert rebalance.attributes == {
        "expertmesh.outcome": "applied",
        "expertmesh.placement_epoch": cluster.known.placement.epoch,
        "expertmesh.balancedness.before": last["balancedness"]["before"],
        "expertmesh.balancedness.predicted": last["balancedness"]["predicted"],
        **moved,
    }
    assert rebalance.status.is_unset
    assert length_ns(rebalance) == round(last["seconds"] * 1e9)


def test_a_rebalancing_that_fails_says_so() -> None:
    cluster = make()
    kept = followed(cluster)
    window(cluster, SKEWED)
    cluster.disconnect("expert-3")
    cluster.tick(0.2)
    assert cluster.link.ended == ["expert-3"]
    (rebalance,) = (span for span in kept.spans if span.name == "expertmesh.rebalance")
    assert rebalance.attributes is not None
    assert rebalance.attributes["error.type"] == rebalance.status.description == "failed"
    assert rebalance.status.status_code is StatusCode.ERROR


def test_a_recovery_lasts_from_the_loss_until_steps_run_again() -> None:
    cluster = FakeCluster(1, 3)
    cluster.serve()
    kept = followed(cluster)
    lose(cluster, "expert-1")
    cluster.join_all(highest_step=6)
    cluster.now += 0.5
    cluster.answer_loads("expert-0")
    cluster.answer_loads("expert-2")
    assert cluster.link.ended == ["expert-1"]
    *migrations, recovery = kept.spans
    reasons = [(span.attributes or {})["expertmesh.reason"] for span in migrations]
    assert reasons == ["recovery"] * 2
    assert recovery.name == "expertmesh.recovery"
    assert recovery.attributes == {"expertmesh.lost_workers": ("expert-1",)}
    assert length_ns(recovery) == 500_000_000


def test_gateways_know_the_trace_of_a_recovery_while_it_goes_on() -> None:
    observability = ObservabilitySection(otlp_endpoint="http://127.0.0.1:4317")
    cluster = FakeCluster(1, 3, config=replace(CONFIG, observability=observability))
    cluster.serve()
    kept = followed(cluster)
    lose(cluster, "expert-1")
    (known,) = cluster.controller.snapshot()["changes"]
    assert (known["name"], known["seconds"]) == ("expertmesh.recovery", None)
    cluster.join_all(highest_step=6)
    cluster.now += 0.5
    cluster.answer_loads("expert-0")
    cluster.answer_loads("expert-2")
    assert cluster.link.ended == ["expert-1"]
    ended, *_ = cluster.controller.snapshot()["changes"]
    assert ended == {**known, "seconds": 0.5}
    context = kept.spans[-1].context
    assert context is not None
    assert known["span_id"] == f"{context.trace_id:032x}{context.span_id:016x}"


def test_without_a_collector_gateways_are_told_of_no_traces() -> None:
    cluster = FakeCluster(1, 3)
    cluster.serve()
    lose(cluster, "expert-1")
    assert cluster.controller.snapshot()["changes"] == []


def test_a_trace_that_fails_leaves_no_span() -> None:
    kept = KeptSpans()
    with pytest.raises(ValueError, match="NaN"):
        kept.export.record("expertmesh.migration", float("nan"), {})
    assert not kept.spans


def test_a_controller_without_the_packages_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    assert start_traces("http://127.0.0.1:4317", "controller") is None
    assert start_traces(None, "controller") is None
