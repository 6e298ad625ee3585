"""The page of metrics, from the tables and registries of gateways, controller and workers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import get_args

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

import workers
from cluster.controller.metrics import ControllerMetrics
from cluster.core.metric_families import PlainFamily
from cluster.core.topology import Role
from docs.generate.markdown import code, page, prose, table
from gateway.observability.cluster_metrics import TOTAL_TEXTS, WORKER_TEXTS, cluster_families
from gateway.observability.load_metrics import load_families
from gateway.observability.metrics import PREFIX, GatewayMetrics
from gateway.observability.unlocked_histogram import UnlockedHistogram
from gateway.observability.vllm_names import OLDER_VLLM_NAMES, VLLM_NAMES
from workers.metrics.step_metrics import BUBBLE, HISTOGRAMS

_INTRODUCTION = f"""This page lists every metric at `/metrics`, grouped by what it measures. Names
begin with `{PREFIX}`, or with the value of `--metrics-prefix`. Every series has the label
`model_name`; with several gateways, the series of gateways also have `gateway`. `engine` is an
attention worker's rank, and empty for expert workers. A histogram has the series `_bucket`, `_sum`
and `_count`. Of each role, the workers with ranks below 16 have histograms; in histograms of
gateways, `engine` is `rest` for all attention workers with higher ranks. With
`--vllm-metric-names`, metrics marked *vLLM* also have vLLM's names. If keys are configured, a
request with a client key gets [fewer metrics](security.md#what-a-clients-key-shows). [Monitor a
cluster](../how-to/monitoring.md) describes which metrics to watch."""
_CACHE_CONFIG = {"block_size": "", "cache_dtype": "", "enable_prefix_caching": ""}
Row = tuple[str, str, tuple[str, ...], str]
"""Name, type, labels, help."""


def metrics() -> str:
    """The page."""
    gateway = GatewayMetrics("", lambda: None)
    controller = ControllerMetrics(get_args(Role))
    taken = {name for name, *_ in of_registry(gateway._registry)}
    return page(
        "Metrics",
        _INTRODUCTION,
        f"## Gateways\n\n{_table(of_registry(gateway._registry))}",
        f"## Controller\n\n{_table([_state(), *of_registry(controller._registry)])}",
        f"## Attention workers together\n\n{_table(_totals())}",
        f"## Experts\n\n{_table(of_experts())}",
        f"## Workers\n\n{_table(of_workers(taken))}",
    )


def of_registry(registry: CollectorRegistry) -> Iterator[Row]:
    """The metrics of a registry, with or without series."""
    for collector in registry._collector_to_names:
        if isinstance(collector, UnlockedHistogram):
            (family,) = collector.describe()
            yield family.name, family.type, collector.label_names, family.documentation
            continue
        assert isinstance(collector, MetricWrapperBase)
        kind, labels = str(collector._type), tuple(collector._labelnames)
        suffix = "_total" if kind == "counter" else ""
        yield collector._name + suffix, kind, labels, collector._documentation


def of_experts() -> Iterator[Row]:
    """The metrics of the load document, by a document with everything in it."""
    phases = {"prefill": {"achieved": 1.0, "predicted": 1.0}}
    watched = {"watched": [0], "watched_tokens": [1], "rest_tokens": 0}
    bank = {"layer": 0, "bank": 0, "counts": [1], **watched, "copies": [1], "at_risk": 0}
    document = {"banks": [{**bank, "phases": phases}], "phases": phases}
    return map(_row_of, load_families(document, all_experts=False))


def of_workers(taken: set[str]) -> Iterator[Row]:
    """The numbers of workers, by a snapshot of a worker that reports every one of them."""
    stats = {f"{name}_sum" if _is_histogram(name) else name: 1.0 for name in WORKER_TEXTS}
    worker = {"name": "", "role": "colocated", "rank": 0, "state": "SERVING", "stats": stats}
    found = {
        row[0]: row
        for family in cluster_families({"workers": [worker]}, taken, _CACHE_CONFIG)
        if (row := _row_of(family))[0] in WORKER_TEXTS
    }
    more = labels_in_sources()
    for name in WORKER_TEXTS:
        if name in found:
            _, kind, labels, text = found[name]
            yield name, kind, tuple(dict.fromkeys((*labels, *more.get(name, ())))), text


def labels_in_sources() -> dict[str, set[str]]:
    """Labels that workers give their numbers themselves: most names are written with them."""
    found: dict[str, set[str]] = {name: {"phase"} for name in (*HISTOGRAMS.values(), BUBBLE)}
    found |= {f"lora_requests_{state}": {"lora_name"} for state in ("running", "waiting")}
    found["kv_tier_usable"] = {"tier"}
    for source in Path(workers.__path__[0]).rglob("*.py"):
        text = source.read_text(encoding="utf-8")
        in_names = re.findall(r"\b(\w+)\{\{?(\w+)=", text)
        in_calls = re.findall(r"\.stats\(\s*\"(\w+)\",\s*f?'(\w+)=", text)
        for name, label in (*in_names, *in_calls):
            found.setdefault(name, set()).add(label)
    return found


def _is_histogram(name: str) -> bool:
    others = ("iteration_tokens_total", "kv_migration_seconds", "kv_restore_seconds")
    return name in (*HISTOGRAMS.values(), BUBBLE, *others)


def _state() -> Row:
    return _row_of(next(iter(cluster_families({}, (), {}))))


def _totals() -> Iterator[Row]:
    return ((name, "gauge", (), text) for name, text in TOTAL_TEXTS.items())


def _row_of(family: PlainFamily) -> Row:
    suffix = "_total" if family["type"] == "counter" else ""
    return family["name"] + suffix, family["type"], tuple(family["samples"][0][1]), family["text"]


def _table(rows: Iterable[Row]) -> str:
    columns = ("Metric", "Type", "Labels", "Description", "vLLM")
    lines = [
        (code(name), kind, ", ".join(map(code, labels)), prose(text) + ".", _of_vllm(name))
        for name, kind, labels, text in rows
    ]
    return table(columns, lines)


def _of_vllm(name: str) -> str:
    base = name if name in VLLM_NAMES else name.removesuffix("_total")
    names = [base, OLDER_VLLM_NAMES.get(base, "")] if base in VLLM_NAMES else []
    end = name.removeprefix(base)
    return ", ".join("vLLM" if n == base else f"also {code(n + end)}" for n in names if n)
