"""Prometheus metrics of the cluster's state, and of recoveries: how many, and how long."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

_STATES = ("STARTING", "SERVING", "DEGRADED", "RECOVERING", "DRAINING", "STOPPED")


class RecoveryCollector(Collector):
    """State and counts in the controller's snapshot, read at each scrape.

    Args:
        model_name: label of every series.
        prefix: in front of every name.
        snapshot: the controller's latest, None while there is none.
    """

    def __init__(
        self,
        model_name: str,
        prefix: str,
        snapshot: Callable[[], Mapping[str, Any] | None],
    ) -> None:
        self._model_name = model_name
        self._prefix = prefix
        self._snapshot = snapshot

    def describe(self) -> list[Metric]:
        """Nothing is fixed beforehand."""
        return []

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
        for cause, found in (snapshot.get("recoveries") or {}).items():
            total.add_metric((self._model_name, cause), found["count"])
            buckets = [(str(float(limit)), count) for limit, count in found["buckets"]]
            buckets.append(("+Inf", found["count"]))
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
