"""Prometheus metrics of a replica, in its own registry: its counts and the workers' stats.

Metrics that vLLM has, too, have vLLM's names and meanings, with the prefix ``expertmesh:``. Labels
never contain a request id, a key or a user.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

from prometheus_client import Counter, Histogram

from cluster.config.gateway import VLLM_PREFIX
from cluster.core.metric_families import MergedFamilies, PlainFamily, new_registry, to_plain
from gateway.cluster.client_view import client_families
from gateway.cluster.view import Snapshot
from gateway.core.replay import ReplayCause
from gateway.observability import vllm_names
from gateway.observability.cluster_metrics import cluster_families, histogram_label
from gateway.observability.load_metrics import load_families
from gateway.observability.unlocked_histogram import UnlockedHistogram
from workers.requests.request import FinishReason, Timings

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REJECTIONS = (
    *("queue_full", "queue_tokens", "queue_wait", "worker_queue_full", "deadline"),
    *("key_requests", "key_tokens", "key_concurrency"),
)
"""Values of the label ``reason`` of ``admission_rejections``; see ``cluster.core.errors``."""
PREFIX = "expertmesh:"
"""Default prefix of every name."""

_TOKEN_BUCKETS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))
_TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0),
)
_ITL_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5),
    *(1.0, 2.5, 5.0),
)
"""Bounds in seconds, including all limits that vLLM's dashboard offers for a time per token."""
_TIME_BUCKETS = (0.01, 0.03, 0.1, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_HTTP_BUCKETS = (0.1, 0.5, 1.0)
"""Bounds in seconds, few as there are many routes; the same as vLLM has, from
prometheus-fastapi-instrumentator."""
_COUNT_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


class GatewayMetrics:
    """Counts the requests of one replica, and renders its metrics with the cluster's.

    Args:
        model_name: label of every series.
        snapshot: returns the cluster's state, with the workers' stats, for a scrape.
        cache_config: labels of ``cache_config_info``.
        load: returns the experts' load for a scrape, or None if it is not known.
        all_experts: whether each expert has a series, not only the busiest ones.
        prefix: prefix of every name.
        has_vllm_names: whether to export vLLM's metrics also under vLLM's names.
        revision: label of every series; empty: no such label, for the first revision of a model.
    """

    def __init__(
        self,
        model_name: str,
        snapshot: Callable[[], Snapshot | None],
        cache_config: Mapping[str, str] | None = None,
        load: Callable[[], Mapping[str, Any] | None] = lambda: None,
        all_experts: bool = False,
        prefix: str = PREFIX,
        has_vllm_names: bool = False,
        revision: str = "",
    ) -> None:
        self.labels = {"model_name": model_name, **({"revision": revision} if revision else {})}
        self.key = "\0".join(self.labels.values())
        """Key of the metrics among the metrics of other models and revisions."""
        self.prefix = prefix
        self.has_vllm_names = has_vllm_names
        self._snapshot, self._load = snapshot, load
        self._cache_config, self._all_experts = cache_config or {}, all_experts
        self._registry = registry = new_registry()
        count, labels = partial(Counter, registry=registry), ("engine",)
        success = count(
            "request_success", "Choices that ended, by reason", (*labels, "finished_reason")
        )
        counters = {name: count(name, text, labels) for name, text in _ENGINE_COUNTERS.items()}
        histograms = {
            name: UnlockedHistogram(name, text, labels, registry=registry, buckets=buckets)
            for name, (text, buckets) in _ENGINE_HISTOGRAMS.items()
        }
        make_engine = partial(EngineMetrics, success, counters, histograms)
        self.engine: Callable[[str], EngineMetrics] = cache(make_engine)
        """Returns the metrics of an engine by the index of its worker; "" for calls without one."""
        self.http_requests = count("http_requests", "HTTP requests", ("route", "method", "status"))
        self.http_durations = Histogram(
            "http_request_duration_seconds",
            "Time from an HTTP request to the end of its response",
            ("route", "method"),
            registry=registry,
            buckets=_HTTP_BUCKETS,
        )
        self.grpc_requests = count("grpc_requests", "gRPC requests", ("service", "method", "code"))
        self.client_disconnects = count(
            "client_disconnects", "Clients that disconnected before the response ended"
        )
        self.sse_events = count("sse_events", "Server-sent events")
        self.admission_rejections = count(
            "admission_rejections", "Requests rejected at admission, by reason", ("reason",)
        )
        self.requests_replayed = count(
            "requests_replayed", "Requests replayed at another attention worker", ("cause",)
        )
        self.tokens_recomputed = count(
            "tokens_recomputed",
            "Prompt and output tokens recomputed for replayed requests",
            ("cause",),
        )
        for reason in REJECTIONS:  # creates the series with value 0
            self.admission_rejections.labels(reason)
        for cause in ReplayCause:
            self.requests_replayed.labels(cause.value)
            self.tokens_recomputed.labels(cause.value)
        self.stream_lag = UnlockedHistogram(
            "gateway_stream_lag_seconds",
            "Time from a token's arrival at the gateway to its sending",
            registry=registry,
            buckets=_ITL_BUCKETS,
        ).labels()
        self._own = {
            f"{f.name}_total" if f.type == "counter" else f.name for f in registry.collect()
        }

    def follow(
        self,
        snapshot: Callable[[], Snapshot | None],
        load: Callable[[], Mapping[str, Any] | None] = lambda: None,
    ) -> None:
        """Take the cluster's state and the experts' load from other functions."""
        self._snapshot, self._load = snapshot, load

    def own_families(self) -> list[PlainFamily]:
        """Return the metrics that this replica counts, as plain data for another replica."""
        return to_plain(self._registry)

    def own_samples(self, names: Iterable[str]) -> list[PlainFamily]:
        """Return only the samples of ``own_families`` with these names, at a tenth of the cost."""
        return to_plain(self._registry.restricted_registry(names))

    def render(self) -> bytes:
        """Return the exposition in Prometheus text format, of the only replica and model."""
        return render_metrics([self])

    def parts(
        self, replicas: Mapping[str, Mapping[str, list[PlainFamily]]] | None, is_whole: bool
    ) -> Iterator[_Part]:
        """Yield the families of the model with their labels, see ``render_metrics``."""
        model = self.labels
        if replicas is None:
            yield self.own_families(), model
        for name, found in (replicas or {}).items():
            yield found.get(self.key, []), {**model, "gateway": name}
        families = self._cluster_families(is_whole)
        yield (families if is_whole else list(client_families(families))), model

    def _cluster_families(self, has_load: bool) -> list[PlainFamily]:
        families: list[PlainFamily] = []
        if (snapshot := self._snapshot()) is not None:
            families += cluster_families(snapshot, self._own, self._cache_config)
        if has_load and (load := self._load()) is not None:
            families += load_families(load, self._all_experts)
        return families


_Part = tuple[list[PlainFamily], Mapping[str, str]]
"""Families, and labels of all their series."""


def render_metrics(
    models: Sequence[GatewayMetrics],
    replicas: Mapping[str, Mapping[str, list[PlainFamily]]] | None = None,
    is_whole: bool = True,
) -> bytes:
    """Return the exposition of the metrics of all models in Prometheus text format.

    ``replicas`` are the ``own_families`` of each replica by model; the names become the labels
    ``gateway`` and ``model_name``; None if this is the only replica. Unless ``is_whole``, series by
    expert or layer are omitted.
    """
    parts = [part for model in models for part in model.parts(replicas, is_whole)]
    names = models[0].prefix, models[0].has_vllm_names
    return b"".join(merged.render() for merged in _merged(parts, *names))


def _merged(parts: Sequence[_Part], prefix: str, has_vllm_names: bool) -> Iterator[MergedFamilies]:
    """Yield the labelled families in ``parts`` under our names and, if enabled, vLLM's."""
    merged = MergedFamilies(prefix)
    for families, labels in parts:
        merged.add(families, **labels)
    yield merged
    if has_vllm_names:
        now = time.time()
        merged, unprefixed = MergedFamilies(VLLM_PREFIX), MergedFamilies("")
        for families, labels in parts:
            merged.add(vllm_names.as_vllm(families, now), **labels)
            unprefixed.add(vllm_names.as_instrumentator(families), **labels)
        yield merged
        yield unprefixed


_ENGINE_COUNTERS = {
    "prompt_tokens": "Prompt tokens of accepted requests",
    "prompt_tokens_cached": "Prompt tokens found in the prefix cache, each prompt counted once",
    "generation_tokens": "Generated tokens that have arrived at the gateway",
}
_ENGINE_HISTOGRAMS = {
    "request_prompt_tokens": ("Tokens per prompt", _TOKEN_BUCKETS),
    "request_generation_tokens": ("Generated tokens per choice", _TOKEN_BUCKETS),
    "request_prefill_kv_computed_tokens": (
        "Tokens of a prompt that were not found in the prefix cache",
        _TOKEN_BUCKETS,
    ),
    "request_max_num_generation_tokens": (
        "Generated tokens of the longest choice of a request",
        _TOKEN_BUCKETS,
    ),
    "request_params_n": ("Parameter n of a request", _COUNT_BUCKETS),
    "request_params_max_tokens": ("Parameter max_tokens of a request", _TOKEN_BUCKETS),
    "time_to_first_token_seconds": ("Time to first token", _TTFT_BUCKETS),
    "inter_token_latency_seconds": ("Time between two tokens of a choice", _ITL_BUCKETS),
    "request_time_per_output_token_seconds": (
        "Mean time per output token of a choice",
        _ITL_BUCKETS,
    ),
    "e2e_request_latency_seconds": ("End-to-end latency of a request", _TIME_BUCKETS),
    "request_queue_time_seconds": ("Time that a request waits in an engine", _TIME_BUCKETS),
    "request_inference_time_seconds": (
        "Time from the first scheduled step to the end",
        _TIME_BUCKETS,
    ),
    "request_prefill_time_seconds": (
        "Time from the first scheduled step to the first token",
        _TIME_BUCKETS,
    ),
    "request_decode_time_seconds": ("Time from the first token to the end", _TIME_BUCKETS),
}
"""Help text and buckets of each histogram of ``EngineMetrics``, by name."""


class EngineMetrics:
    """Metrics of the calls of this replica that one engine computes, with vLLM's labels.

    A call counts for the engine of its first prompt; a choice counts for the engine of its prompt.
    """

    def __init__(
        self,
        success: Counter,
        counters: Mapping[str, Counter],
        histograms: Mapping[str, UnlockedHistogram],
        engine: str,
    ) -> None:
        self._success = {r.value: success.labels(engine, r.value) for r in FinishReason}
        self._counters = {name: family.labels(engine) for name, family in counters.items()}
        shared = histogram_label(engine)
        self._histograms = {name: family.labels(shared) for name, family in histograms.items()}

    def count(self, name: str, amount: int) -> None:
        """Add to one of ``_ENGINE_COUNTERS``."""
        self._counters[name].inc(amount)

    def observe(self, name: str, value: float) -> None:
        """Add a value to one of ``_ENGINE_HISTOGRAMS``."""
        self._histograms[name].observe(value)

    def add_success(self, reason: str) -> None:
        self._success[reason].inc()

    def observe_timings(self, timings: Timings) -> None:
        begins_s, first_s = timings.first_dispatch_s, timings.first_token_s
        ends_s = timings.finished_s
        self.observe("request_queue_time_seconds", max(0.0, begins_s))
        self.observe("request_prefill_time_seconds", max(0.0, first_s - begins_s))
        self.observe("request_decode_time_seconds", max(0.0, ends_s - first_s))
        self.observe("request_inference_time_seconds", max(0.0, ends_s - begins_s))
