"""Queries of dashboards and rules, in the form in which Prometheus takes them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from tests.paths import ROOT

FOLDER = ROOT / "k8s" / "monitoring"
RATE_INTERVAL_S = 20
_TIME = re.compile(r"(\d+)([smh])")
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def panel_queries() -> dict[str, str]:
    """The queries of our Grafana dashboard by panel and number, as Grafana sends them."""
    dashboard = json.loads((FOLDER / "dashboard.json").read_text())
    return {
        f"{panel['title']} {number}": as_sent(target["expr"])
        for panel in dashboard["panels"]
        for number, target in enumerate(panel["targets"])
    }


def as_sent(expression: str, model: str = ".*") -> str:
    """A query with Grafana's variables replaced."""
    known = expression.replace("$__rate_interval", f"{RATE_INTERVAL_S}s")
    known = known.replace("$__range", f"{RATE_INTERVAL_S}s")
    return re.sub(r"\$\w+", model, known)


def alert_rules() -> dict[str, Any]:
    """Our rules, as a file of Prometheus has them."""
    rules: dict[str, Any] = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
    return rules


def hastened(rules: Mapping[str, Any], factor: int) -> dict[str, Any]:
    """The same rules for a test: every time in them is divided by ``factor``, at least 2 s."""

    def shorter(text: str) -> str:
        return _TIME.sub(lambda m: f"{max(2, int(m[1]) * _SECONDS[m[2]] // factor)}s", text)

    def changed(rule: Mapping[str, Any]) -> dict[str, Any]:
        expression = re.sub(r"\[\w+\]", lambda m: shorter(m[0]), rule["expr"])
        wait = {"for": shorter(rule["for"])} if "for" in rule else {}
        return {**rule, "expr": expression, **wait}

    return {
        "groups": [{**g, "rules": [changed(rule) for rule in g["rules"]]} for g in rules["groups"]]
    }


def names_in(expression: str) -> set[str]:
    """The metrics that an expression asks for, with their prefix."""
    return set(re.findall(r"\b(?:expertmesh|vllm):[a-z_0-9]+", expression))


_QUANTILE = "histogram_quantile(0.95, sum by(le) (rate(vllm:{}_bucket{{{}}}[$__rate_interval])))"
_MEAN = (
    "rate(vllm:{0}_sum{{{1}}}[$__rate_interval])\n/\nrate(vllm:{0}_count{{{1}}}[$__rate_interval])"
)
_SUM = "rate(vllm:{}_sum{{{}}}[$__rate_interval])"
_HEATMAP = "sum by(le) (increase(vllm:{}_bucket{{{}}}[$__rate_interval]))"
_RATE = "sum(rate(vllm:{}_total{{{}}}[$__rate_interval]))"
_PLAIN = "vllm:{}{{{}}}"
_LATENCIES = (
    *("e2e_request_latency_seconds", "time_to_first_token_seconds", "inter_token_latency_seconds"),
)
_MODEL = 'model_name="$model_name"'
_ENGINE = 'job=~"$job", model_name=~"$model_name", instance=~"$instance", engine=~"$engine"'
VLLM_FORMS: Mapping[str, tuple[str, ...]] = {
    _QUANTILE: (*_LATENCIES, "request_prompt_tokens", "request_generation_tokens"),
    _MEAN: _LATENCIES,
    _SUM: (
        *("request_queue_time_seconds", "request_prefill_time_seconds"),
        *("request_decode_time_seconds", "request_max_num_generation_tokens"),
        *("request_inference_time_seconds", "request_time_per_output_token_seconds"),
        *("request_params_n", "request_params_max_tokens", "request_prefill_kv_computed_tokens"),
    ),
    _HEATMAP: ("request_prompt_tokens", "request_generation_tokens", "iteration_tokens_total"),
    _RATE: (
        *("prompt_tokens", "generation_tokens", "prompt_tokens_cached", "request_success"),
        *("prefix_cache_hits", "prefix_cache_queries", "num_preemptions"),
        "prompt_tokens_by_source",
    ),
    _PLAIN: (
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
        *("num_requests_waiting_by_reason", "cache_config_info"),
        *("gpu_cache_usage_perc", "time_per_output_token_seconds_count"),
    ),
}
"""Forms of the queries of vLLM's dashboards, with the metrics that they ask for.

Source: vllm-project/vllm, ``examples/observability``: ``prometheus_grafana/grafana.json`` and
``dashboards/grafana/{performance_statistics,query_statistics,vllm_overview,vllm_kv_cache}.json``;
the last of the plain ones are from releases before 0.11.
"""


VLLM_LIMITS = {
    "time_to_first_token_seconds": ("0.1", "0.25", "0.5", "0.75", "1.0", "2.5", "5.0", "10.0"),
    "request_time_per_output_token_seconds": (
        *("0.025", "0.05", "0.075", "0.1", "0.15", "0.2", "0.3", "0.5"),
    ),
}
"""Bounds of buckets that ``vllm_overview.json`` offers as limits."""
_HTTP_MEAN = (
    "sum by (handler) (rate(http_request_duration_seconds_sum[$__rate_interval])) / "
    "(sum by (handler) (rate(http_request_duration_seconds_count[$__rate_interval])) > 0)"
)
VLLM_HTTP = (
    'sum by (status) (rate(http_requests_total{status="2xx"}[$__rate_interval]))',
    'sum by (handler) (rate(http_requests_total{handler="/v1/completions"}[$__rate_interval]))',
    _HTTP_MEAN,
)


def vllm_queries(model: str) -> Iterator[str]:
    """Queries as vLLM's dashboards send them for a model, all engines of it and all instances."""
    for form, names in VLLM_FORMS.items():
        for name in names:
            yield as_sent(form.format(name, _MODEL), model)
            yield as_sent(form.format(name, _ENGINE).replace("$model_name", model))
    for name, limits in VLLM_LIMITS.items():
        for limit in limits:
            yield as_sent(f'rate(vllm:{name}_bucket{{le="{limit}"}}[$__rate_interval])')
    yield from map(as_sent, VLLM_HTTP)
    both = "sum by(finished_reason) (increase(vllm:request_success_total{{{}}}[$__rate_interval]))"
    yield as_sent(both.format(_MODEL), model)
    waiting = 'sum(vllm:num_requests_waiting_by_reason{{{}, reason="{}"}})'
    for reason in ("capacity", "deferred"):
        yield as_sent(waiting.format(_ENGINE, reason))
