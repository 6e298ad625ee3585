"""Prometheus metrics of rebalancing: what became of it, and the weights that moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from gateway.snapshot_metrics import SnapshotCollector, buckets_of

_LABELS = ("model_name", "reason")


class RebalanceCollector(SnapshotCollector):
    """The counts in the controller's snapshot."""

    def collect(self) -> Iterator[Metric]:
        """Nothing while the controller has not been heard of."""
        counts = ((self._snapshot() or {}).get("rebalance") or {}).get("counts")
        if counts is None:
            return
        total = CounterMetricFamily(
            self._prefix + "rebalance",
            "Decisions on the placement, by outcome",
            labels=("model_name", "outcome"),
        )
        for outcome, count in counts["outcomes"].items():
            total.add_metric((self._model_name, outcome), count)
        yield total
        yield self._stalls(counts["stalls"])
        moves = (self._snapshot() or {}).get("migrations") or {}
        yield self._moved("migration_bytes", "Weights that moved", "bytes", moves)
        yield self._moved("migration_slots_moved", "Slots that were filled", "slots", moves)
        yield self._seconds(moves)

    def _stalls(self, stalls: Mapping[str, Any]) -> Metric:
        family = HistogramMetricFamily(
            self._prefix + "rebalance_stall_seconds",
            "What steps with work waited for the first header of a new placement epoch",
            labels=("model_name",),
        )
        buckets = buckets_of(stalls["buckets"], stalls["count"])
        family.add_metric((self._model_name,), buckets, sum_value=stalls["sum"])
        return family

    def _moved(self, name: str, text: str, key: str, moves: Mapping[str, Any]) -> Metric:
        family = CounterMetricFamily(self._prefix + name, text, labels=_LABELS)
        for reason, moved in _with_rebalance(moves).items():
            family.add_metric((self._model_name, reason), moved[key])
        return family

    def _seconds(self, moves: Mapping[str, Any]) -> Metric:
        family = HistogramMetricFamily(
            self._prefix + "migration_seconds",
            "From the decision, or the order to load, to the end of a change",
            labels=_LABELS,
        )
        for reason, moved in moves.items():
            seconds = moved["seconds"]
            buckets = buckets_of(seconds["buckets"], seconds["count"])
            family.add_metric((self._model_name, reason), buckets, sum_value=seconds["sum"])
        return family


def _with_rebalance(moves: Mapping[str, Any]) -> Mapping[str, Any]:
    """Counters begin at 0: that of rebalancing is there before anything has moved."""
    return {"rebalance": {"bytes": 0, "slots": 0}, **moves}
