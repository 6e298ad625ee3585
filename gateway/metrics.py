"""Prometheus metrics in a registry of our own: this replica's counts and the workers' numbers.

Names and meanings follow vLLM where it has them, with the prefix ``expertmesh:``. Labels never hold
a request id, a key or a user.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cluster.topology import holds_experts, runs_attention
from gateway.cluster_view import Snapshot
from gateway.load_metrics import LoadCollector
from gateway.metric_texts import GAUGES, TEXTS
from gateway.rebalance_metrics import RebalanceCollector
from gateway.recovery_metrics import RecoveryCollector
from gateway.replica_metrics import ReplicaFamilies, families_to_plain
from gateway.submission import ReplayCause
from workers.request import Timings

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Of the exposition."""
PREFIX = "expertmesh:"
"""In front of every name, unless the operator wants another."""

_TOKEN_BUCKETS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))
_TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0),
)
_ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0)
_TIME_BUCKETS = (0.01, 0.03, 0.1, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_COUNT_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
_LABEL = r'[a-z]+="[^"\\\n]*"'
_LEGAL_NAME = re.compile(rf"([a-zA-Z_][a-zA-Z0-9_]*)(?:\{{({_LABEL}(?:,{_LABEL})*)\}})?")
"""Of a worker's number: a name, perhaps with labels."""
_WORKER_HISTOGRAMS = (
    "iteration_tokens_total",
    "kv_migration_seconds",
    "attention_compute_seconds",
    "bubble_seconds",
    "combine_seconds",
    "dispatch_seconds",
    "expert_compute_seconds",
)
"""Numbers of workers that are buckets, count and sum of a histogram."""
_WORKER_LABELS = ("model_name", "engine", "worker", "node")


class GatewayMetrics:
    """All metrics of one replica.

    Args:
        model_name: label of every series.
        snapshot: gives the cluster's state, with the workers' numbers, when a scrape comes.
        cache_config: labels of ``cache_config_info``.
        load: gives the experts' load when a scrape comes, None while it is not known.
        all_experts: a series for each expert, not only for the busiest.
        prefix: in front of every name.
    """

    def __init__(
        self,
        model_name: str,
        snapshot: Callable[[], Snapshot | None],
        cache_config: Mapping[str, str] | None = None,
        load: Callable[[], Mapping[str, Any] | None] = lambda: None,
        all_experts: bool = False,
        prefix: str = PREFIX,
    ) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self._model_name = model_name
        self._prefix = prefix
        self._registry = CollectorRegistry()
        self._cluster = CollectorRegistry()
        self._own: set[str] = set()
        self._of_engines = _EngineFamilies(prefix, self._registry)
        self._own |= self._of_engines.names
        self._engines: dict[str, EngineMetrics] = {}
        count, time = self._counter, self._histogram
        self.http_requests = count("http_requests", "HTTP requests", "route", "method", "status")
        self.grpc_requests = count("grpc_requests", "gRPC requests", "service", "method", "code")
        self.client_disconnects = count("client_disconnects", "Clients that left before the end")
        self.sse_events = count("sse_events", "Events sent on streams")
        self.admission_rejections = count("admission_rejections", "Calls turned away", "reason")
        self.requests_replayed = count(
            "requests_replayed", "Requests that went on at another attention worker", "cause"
        )
        self.tokens_recomputed = count(
            "tokens_recomputed",
            "Tokens of prompts and outputs that were computed anew for them",
            "cause",
        )
        for cause in ReplayCause:
            self.requests_replayed.add(cause.value, amount=0)
            self.tokens_recomputed.add(cause.value, amount=0)
        self.stream_lag = time(
            "gateway_stream_lag_seconds", "From a token's arrival here to its sending", _ITL_BUCKETS
        )
        collector = _ClusterCollector(
            model_name, prefix, snapshot, frozenset(self._own), cache_config
        )
        self._cluster.register(collector)
        self._cluster.register(LoadCollector(model_name, prefix, load, all_experts))
        self._cluster.register(RebalanceCollector(model_name, prefix, snapshot))
        self._cluster.register(RecoveryCollector(model_name, prefix, snapshot))

    def engine(self, index: str) -> EngineMetrics:
        """What is counted of one engine: the index of an attention worker, "" before any has it."""
        found = self._engines.get(index)
        if found is None:
            found = self._engines[index] = EngineMetrics(self._of_engines, self._model_name, index)
        return found

    def own_families(self) -> list[dict[str, Any]]:
        """What this replica counts, as plain data for another one."""
        return families_to_plain(self._registry.collect())

    def render(self, replicas: Mapping[str, list[dict[str, Any]]] | None = None) -> bytes:
        """The exposition, in Prometheus text format.

        ``replicas`` are the ``own_families`` of several, which get the label ``gateway``; None:
        this one is alone.
        """
        own = self._registry if replicas is None else ReplicaFamilies(replicas)
        return b"".join(map(prometheus_client.generate_latest, (own, self._cluster)))

    def _counter(self, name: str, text: str, *labels: str) -> _Labelled:
        self._own.add(f"{name}_total")
        labels = ("model_name", *labels)
        metric = Counter(self._prefix + name, text, labels, registry=self._registry)
        return _Labelled(metric, self._model_name, has_labels=len(labels) > 1)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        self._own.add(name)
        metric = Histogram(
            self._prefix + name, text, ("model_name",), registry=self._registry, buckets=buckets
        )
        return metric.labels(self._model_name)


_ENGINE_COUNTERS = {
    "prompt_tokens": "Prompt tokens of accepted calls",
    "generation_tokens": "Tokens delivered",
    "request_success": "Choices that ended",
}
_ENGINE_HISTOGRAMS = {
    "request_prompt_tokens": ("Prompt tokens a prompt", _TOKEN_BUCKETS),
    "request_generation_tokens": ("Tokens a choice", _TOKEN_BUCKETS),
    "request_max_num_generation_tokens": ("Tokens of the longest choice", _TOKEN_BUCKETS),
    "request_params_n": ("n of a call", _COUNT_BUCKETS),
    "request_params_max_tokens": ("max_tokens of a prompt", _TOKEN_BUCKETS),
    "time_to_first_token_seconds": ("From the call to its first token", _TTFT_BUCKETS),
    "inter_token_latency_seconds": ("Between two tokens of a choice", _ITL_BUCKETS),
    "request_time_per_output_token_seconds": ("Mean over a choice", _ITL_BUCKETS),
    "e2e_request_latency_seconds": ("From the call to its end", _TIME_BUCKETS),
    "request_queue_time_seconds": ("Waiting in an engine", _TIME_BUCKETS),
    "request_inference_time_seconds": ("From first work to the end", _TIME_BUCKETS),
    "request_prefill_time_seconds": ("From first work to the first token", _TIME_BUCKETS),
    "request_decode_time_seconds": ("From the first token to the end", _TIME_BUCKETS),
}
"""Names with a text and buckets; see ``EngineMetrics``."""


class _EngineFamilies:
    """The families of all ``EngineMetrics``."""

    def __init__(self, prefix: str, registry: CollectorRegistry) -> None:
        labels = ("model_name", "engine")
        own = {"request_success": ("finished_reason",)}
        self.counters = {
            name: Counter(prefix + name, text, (*labels, *own.get(name, ())), registry=registry)
            for name, text in _ENGINE_COUNTERS.items()
        }
        self.histograms = {
            name: Histogram(prefix + name, text, labels, registry=registry, buckets=buckets)
            for name, (text, buckets) in _ENGINE_HISTOGRAMS.items()
        }
        self.names = {f"{name}_total" for name in self.counters} | set(self.histograms)


class EngineMetrics:
    """What this replica counts of the calls that one engine computes, as vLLM labels it.

    A call of several prompts counts where its first prompt is, a choice where its prompt is.
    """

    def __init__(self, families: _EngineFamilies, model_name: str, engine: str) -> None:
        labels = (model_name, engine)
        self._success = families.counters["request_success"]
        self._labels = labels
        self.prompt_tokens = families.counters["prompt_tokens"].labels(*labels)
        self.generation_tokens = families.counters["generation_tokens"].labels(*labels)
        found = {name: family.labels(*labels) for name, family in families.histograms.items()}
        self.request_prompt_tokens = found["request_prompt_tokens"]
        self.request_generation_tokens = found["request_generation_tokens"]
        self.request_max_num_generation_tokens = found["request_max_num_generation_tokens"]
        self.request_params_n = found["request_params_n"]
        self.request_params_max_tokens = found["request_params_max_tokens"]
        self.time_to_first_token = found["time_to_first_token_seconds"]
        self.inter_token_latency = found["inter_token_latency_seconds"]
        self.time_per_output_token = found["request_time_per_output_token_seconds"]
        self.e2e_latency = found["e2e_request_latency_seconds"]
        self._queue_time = found["request_queue_time_seconds"]
        self._inference_time = found["request_inference_time_seconds"]
        self._prefill_time = found["request_prefill_time_seconds"]
        self._decode_time = found["request_decode_time_seconds"]

    def add_success(self, reason: str) -> None:
        """A choice ended."""
        self._success.labels(*self._labels, reason).inc()

    def observe_timings(self, timings: Timings) -> None:
        """Count a choice's times in its engine."""
        self._queue_time.observe(max(0.0, timings.first_dispatch_s))
        self._prefill_time.observe(max(0.0, timings.first_token_s - timings.first_dispatch_s))
        self._decode_time.observe(max(0.0, timings.finished_s - timings.first_token_s))
        self._inference_time.observe(max(0.0, timings.finished_s - timings.first_dispatch_s))


class _Labelled:
    """A counter with the model's name filled in."""

    def __init__(self, counter: Counter, model_name: str, has_labels: bool) -> None:
        self._counter = counter
        self._model_name = model_name
        if not has_labels:
            counter.labels(model_name)  # shows as 0 from the start

    def add(self, *labels: str, amount: float = 1) -> None:
        """Count ``amount`` more for these label values."""
        self._counter.labels(self._model_name, *labels).inc(amount)


class _ClusterCollector(Collector):
    """The workers' numbers, read from the snapshot at each scrape."""

    def __init__(
        self,
        model_name: str,
        prefix: str,
        snapshot: Callable[[], Snapshot | None],
        taken: frozenset[str],
        cache_config: Mapping[str, str] | None,
    ) -> None:
        self._model_name = model_name
        self._prefix = prefix
        self._snapshot = snapshot
        self._taken = taken
        self._cache_config = dict(cache_config or {})

    def describe(self) -> list[Metric]:
        """Nothing is fixed beforehand: names come from the workers."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One family for each number that any worker reports."""
        snapshot = self._snapshot() or {}
        families: dict[str, Metric] = {}
        for worker in snapshot.get("workers", ()):
            numbers = self._numbers(worker, int(snapshot.get("placement_epoch") or 0))
            for key, value in numbers.items():
                match = _LEGAL_NAME.fullmatch(key)
                if match is None or match[1] in self._taken:
                    continue
                labels = self._labels(worker) | _labels_of(match[2] or "")
                family = families.setdefault(_family_name(match[1]), self._family(match[1]))
                family.add_sample(self._prefix + match[1], labels, value)
            if runs_attention(worker["role"]) and self._cache_config:
                self._add_cache_config(families, worker)
        yield from families.values()

    def _numbers(self, worker: Mapping[str, Any], epoch: int) -> dict[str, float]:
        numbers = {name: float(value) for name, value in (worker.get("stats") or {}).items()}
        own = numbers.setdefault("placement_epoch", epoch)
        numbers["placement_epoch_lag"] = max(epoch - own, 0.0)
        if holds_experts(worker["role"]):
            is_up = worker["state"] in ("READY", "SERVING")
            numbers["expert_worker_up"] = float(is_up)
            numbers["expert_worker_slots"] = float(worker.get("slots") or 0)
        if worker.get("kv_usage") is not None:
            numbers.setdefault("kv_cache_usage_perc", float(worker["kv_usage"]))
        return numbers

    def _labels(self, worker: Mapping[str, Any]) -> dict[str, str]:
        engine = str(worker["rank"]) if runs_attention(worker["role"]) else ""
        values = (self._model_name, engine, str(worker["name"]), str(worker.get("node") or ""))
        return dict(zip(_WORKER_LABELS, values, strict=True))

    def _add_cache_config(self, families: dict[str, Metric], worker: Mapping[str, Any]) -> None:
        name = "cache_config_info"
        family = families.get(name) or families.setdefault(name, self._family(name))
        labels = {
            **self._labels(worker),
            **self._cache_config,
            "num_blocks": str(worker.get("kv_blocks_total") or 0),
        }
        family.add_sample(self._prefix + name, labels, 1.0)

    def _family(self, name: str) -> Metric:
        family = _family_name(name)
        text = TEXTS.get(family, family)
        if family in _WORKER_HISTOGRAMS:
            return HistogramMetricFamily(self._prefix + family, text, labels=())
        if name.endswith("_total") and name not in GAUGES:
            return CounterMetricFamily(self._prefix + name.removesuffix("_total"), text, labels=())
        return GaugeMetricFamily(self._prefix + name, text, labels=())


def _labels_of(text: str) -> dict[str, str]:
    """Labels as in the exposition, without braces."""
    pairs = (label.split("=", 1) for label in re.findall(_LABEL, text))
    return {name: value.strip('"') for name, value in pairs}


def _family_name(name: str) -> str:
    """Samples of a histogram have its name and an ending."""
    return next((h for h in _WORKER_HISTOGRAMS if name.startswith(f"{h}_")), name)
