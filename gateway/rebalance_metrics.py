"""Prometheus metrics of rebalancing: what became of it, and the weights that moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from gateway.snapshot_metrics import SnapshotCollector, buckets_of

_REASON = "rebalance"


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
        yield self._moved("migration_bytes", "Weights that moved", counts["bytes"])
        yield self._moved("migration_slots_moved", "Slots that were filled", counts["slots_moved"])
        yield self._seconds(counts["seconds"])

    def _moved(self, name: str, text: str, value: float) -> Metric:
        labels = ("model_name", "reason")
        family = CounterMetricFamily(self._prefix + name, text, labels=labels)
        family.add_metric((self._model_name, _REASON), value)
        return family

    def _seconds(self, seconds: Mapping[str, Any]) -> Metric:
        family = HistogramMetricFamily(
            self._prefix + "migration_seconds",
            "From the decision to the last epoch",
            labels=("model_name", "reason"),
        )
        buckets = buckets_of(seconds["buckets"], seconds["count"])
        family.add_metric((self._model_name, _REASON), buckets, sum_value=seconds["sum"])
        return family
