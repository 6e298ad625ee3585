"""Prometheus metrics of the cluster's state, and of recoveries: how many, and how long."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from gateway.snapshot_metrics import SnapshotCollector, buckets_of

_STATES = ("STARTING", "SERVING", "DEGRADED", "RECOVERING", "DRAINING", "STOPPED")


class RecoveryCollector(SnapshotCollector):
    """State and counts in the controller's snapshot."""

    def collect(self) -> Iterator[Metric]:
        """Nothing while the controller has not been heard of."""
        snapshot = self._snapshot()
        if snapshot is None:
            return
        yield self._state(str(snapshot.get("state")))
        labels = ("model_name", "cause")
        total = CounterMetricFamily(
            self._prefix + "recoveries", "Losses of workers that were made good", labels=labels
        )
        stalls = HistogramMetricFamily(
            self._prefix + "recovery_stall_seconds",
            "From the notice of a loss to the next generation that runs",
            labels=labels,
        )
        recoveries = snapshot.get("recoveries") or {}
        none = {f"{w['role']}_worker": {"count": 0} for w in snapshot.get("workers", ())}
        for cause, found in {**none, **recoveries}.items():  # counters begin at 0
            total.add_metric((self._model_name, cause), found["count"])
        for cause, found in recoveries.items():
            buckets = buckets_of(found["buckets"], found["count"])
            stalls.add_metric((self._model_name, cause), buckets, sum_value=found["sum"])
        yield total
        yield stalls

    def _state(self, current: str) -> Metric:
        family = GaugeMetricFamily(
            self._prefix + "cluster_state",
            "1 for the state that the cluster is in",
            labels=("model_name", "state"),
        )
        for state in _STATES:
            family.add_metric((self._model_name, state), float(state == current))
        return family
