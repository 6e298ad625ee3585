"""Prometheus metrics of the cluster: the controller's, and the workers' numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cluster.core.metric_families import MergedFamilies
from cluster.core.states import ClusterState
from cluster.core.topology import holds_experts, runs_attention
from gateway.cluster.view import Snapshot
from gateway.observability.metric_texts import GAUGES, TEXTS

_LABEL = r'[a-z_]+="[^"\\\n]*"'
_LEGAL_NAME = re.compile(rf"([a-zA-Z_][a-zA-Z0-9_]*)(?:\{{({_LABEL}(?:,{_LABEL})*)\}})?")
"""The name of a worker's number, with or without labels."""
_HISTOGRAM = re.compile("(.+)_(?:bucket|count|sum)")
"""A number that belongs to a histogram of the first group's name."""


@dataclass(frozen=True, eq=False)
class ClusterCollector(Collector):
    """The controller's metrics and the workers' numbers, read from its snapshot at each scrape.

    Args:
        model_name: label of every series.
        prefix: in front of every name.
        snapshot: the controller's latest, None while there is none.
        taken: numbers of workers that the gateway counts itself, and are left out.
        cache_config: labels of ``cache_config_info``.
    """

    model_name: str
    prefix: str
    snapshot: Callable[[], Snapshot | None]
    taken: frozenset[str]
    cache_config: Mapping[str, str]

    def collect(self) -> Iterator[Metric]:
        """Nothing while there is no snapshot."""
        snapshot = self.snapshot()
        if snapshot is None:
            return
        yield self._state(str(snapshot.get("state")))
        controller = MergedFamilies(self.prefix)
        controller.add(snapshot.get("metrics", ()), model_name=self.model_name)
        yield from controller.collect()
        yield from self._of_workers(snapshot)

    def _state(self, current: str) -> Metric:
        family = GaugeMetricFamily(
            self.prefix + "cluster_state",
            "1 for the state that the cluster is in",
            labels=("model_name", "state"),
        )
        for state in ClusterState:
            family.add_metric((self.model_name, state.value), float(state.value == current))
        return family

    def _of_workers(self, snapshot: Snapshot) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for worker in snapshot.get("workers", ()):
            numbers = self._numbers(worker, int(snapshot.get("placement_epoch") or 0))
            for key, value in numbers.items():
                match = _LEGAL_NAME.fullmatch(key)
                if match is None or match[1] in self.taken:
                    continue
                labels = self._labels(worker) | _labels_of(match[2] or "")
                family = families.setdefault(_family_name(match[1]), self._family(match[1]))
                family.add_sample(self.prefix + match[1], labels, value)
        return families.values()

    def _numbers(self, worker: Mapping[str, Any], epoch: int) -> dict[str, float]:
        numbers = {name: float(value) for name, value in (worker.get("stats") or {}).items()}
        own = numbers.setdefault("placement_epoch", epoch)
        numbers["placement_epoch_lag"] = max(epoch - own, 0.0)
        if holds_experts(worker["role"]):
            is_up = worker["state"] in ("READY", "SERVING")
            numbers["expert_worker_up"] = float(is_up)
            numbers["expert_worker_slots"] = float(worker.get("slots") or 0)
        if runs_attention(worker["role"]) and self.cache_config:
            config = {**self.cache_config, "num_blocks": worker.get("kv_blocks_total") or 0}
            labels = ",".join(f'{name}="{value}"' for name, value in config.items())
            numbers[f"cache_config_info{{{labels}}}"] = 1.0
        if worker.get("kv_usage") is not None:
            numbers.setdefault("kv_cache_usage_perc", float(worker["kv_usage"]))
        return numbers

    def _labels(self, worker: Mapping[str, Any]) -> dict[str, str]:
        return {
            "model_name": self.model_name,
            "engine": str(worker["rank"]) if runs_attention(worker["role"]) else "",
            "worker": str(worker["name"]),
            "node": str(worker.get("node") or ""),
        }

    def _family(self, name: str) -> Metric:
        family = _family_name(name)
        text = TEXTS.get(family, family)
        if family != name:
            return HistogramMetricFamily(self.prefix + family, text, labels=())
        if name.endswith("_total") and name not in GAUGES:
            return CounterMetricFamily(self.prefix + name.removesuffix("_total"), text, labels=())
        return GaugeMetricFamily(self.prefix + name, text, labels=())


def _labels_of(text: str) -> dict[str, str]:
    """Labels as in the exposition, without braces."""
    pairs = (label.split("=", 1) for label in re.findall(_LABEL, text))
    return {name: value.strip('"') for name, value in pairs}


def _family_name(name: str) -> str:
    """Samples of a histogram have its name and an ending."""
    histogram = _HISTOGRAM.fullmatch(name)
    return name if histogram is None else histogram[1]
