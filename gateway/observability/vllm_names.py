"""Exports metrics under vLLM's names, so that dashboards for vLLM work.

Meanings and labels are vLLM's, with additional labels (``worker``, ``node``). The names are those
of vLLM 0.32 (``vllm/v1/metrics/loggers.py``) and older ones that dashboards use. vLLM counts HTTP
requests with prometheus-fastapi-instrumentator, under names without a prefix.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from cluster.core.metric_families import PlainFamily

VLLM_NAMES = frozenset(
    {
        "num_requests_running",
        "num_requests_waiting",
        "num_requests_waiting_by_reason",
        "kv_cache_usage_perc",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "num_preemptions",
        "spec_decode_num_drafts",
        "spec_decode_num_draft_tokens",
        "spec_decode_num_accepted_tokens",
        "spec_decode_num_accepted_tokens_per_pos",
        "prompt_tokens",
        "prompt_tokens_cached",
        "generation_tokens",
        "request_success",
        "admission_rejections",
        "cache_config_info",
        "iteration_tokens_total",
        "request_prompt_tokens",
        "request_generation_tokens",
        "request_max_num_generation_tokens",
        "request_params_n",
        "request_params_max_tokens",
        "request_prefill_kv_computed_tokens",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_inference_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
    }
)
"""Names of the families, without the prefix and a counter's ``_total``."""
OLDER_VLLM_NAMES = {
    "kv_cache_usage_perc": "gpu_cache_usage_perc",
    "prefix_cache_queries": "gpu_prefix_cache_queries",
    "prefix_cache_hits": "gpu_prefix_cache_hits",
    "inter_token_latency_seconds": "time_per_output_token_seconds",
}
"""Older names of metrics in ``VLLM_NAMES``."""
BY_SOURCE = "prompt_tokens_by_source"
"""Family of prompt tokens by the source of their KV blocks. A prefix that a worker fetches from
another worker counts as cached, because it is in the cache when the prompt begins."""
_SOURCES = {
    "local_compute": (
        "request_prefill_kv_computed_tokens",
        "request_prefill_kv_computed_tokens_sum",
    ),
    "local_cache_hit": ("prompt_tokens_cached", "prompt_tokens_cached_total"),
}
"""Our family and sample for each value of the label ``source`` (vLLM's ``PromptTokenStats``)."""
LORA_INFO = "lora_requests_info"
"""Family with one series per engine, whose labels name the adapters with requests."""
_OF_LORA = {
    "lora_requests_running": "running_lora_adapters",
    "lora_requests_waiting": "waiting_lora_adapters",
}
"""Maps each of our families to the label of ``LORA_INFO`` that names its adapters."""
_CACHE_CONFIG, _NUM_BLOCKS = "cache_config_info", ("num_blocks", "num_gpu_blocks")
"""A family, and our name and vLLM's name of one of its labels, which endpoint pickers parse."""
_Labels = tuple[tuple[str, str], ...]
_OF_HTTP = frozenset({"http_requests", "http_request_duration_seconds"})
_PROBES = frozenset({"/health", "/ready", "/metrics", "/version"})
"""Paths whose requests vLLM does not count. Source: its dashboard ``vllm_overview.json``."""


def as_vllm(families: Sequence[PlainFamily], now: float) -> Iterator[PlainFamily]:
    """Yield families under vLLM's current and older names. ``now`` is the Unix time in seconds."""
    for family in families:
        if (name := family["name"]) in VLLM_NAMES:
            yield _with_num_blocks(family) if name == _CACHE_CONFIG else family
            if (older := OLDER_VLLM_NAMES.get(name)) is not None:
                samples = [
                    [older + sample.removeprefix(name), labels, value]
                    for sample, labels, value in family["samples"]
                ]
                yield {**family, "name": older, "samples": samples}
    yield from _by_source({family["name"]: family for family in families})
    yield from _lora_info(families, now)


def _with_num_blocks(family: PlainFamily) -> PlainFamily:
    ours, theirs = _NUM_BLOCKS
    samples = [
        [sample, {**labels, theirs: labels.get(ours, "")}, value]
        for sample, labels, value in family["samples"]
    ]
    return {**family, "samples": samples}


def as_instrumentator(families: Sequence[PlainFamily]) -> Iterator[PlainFamily]:
    """Yield number and duration of HTTP requests as vLLM's server exports them.

    Labels are ``handler``, ``method`` and, for the number, ``status``, such as 2xx. Requests for
    ``_PROBES`` are not counted.
    """
    for family in families:
        if family["name"] not in _OF_HTTP:
            continue
        values: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()
        for sample, labels, value in family["samples"]:
            if labels["route"] not in _PROBES:
                values[sample, tuple(_http_labels(labels).items())] += value
        samples = [[sample, dict(labels), value] for (sample, labels), value in values.items()]
        yield {**family, "samples": samples}


def _http_labels(labels: Mapping[str, str]) -> dict[str, str]:
    theirs = {"handler": labels["route"], "method": labels["method"]}
    if "status" in labels:
        theirs["status"] = f"{labels['status'][0]}xx"
    return theirs | {name: value for name, value in labels.items() if name == "le"}


def _by_source(families: Mapping[str, PlainFamily]) -> Iterator[PlainFamily]:
    """Yield the computed and the cached prompt tokens of each engine."""
    samples = [
        [f"{BY_SOURCE}_total", {**labels, "source": source}, value]
        for source, (name, sample_name) in _SOURCES.items()
        for sample, labels, value in families.get(name, {}).get("samples", ())
        if sample == sample_name
    ]
    if samples:
        text = "Prompt tokens by source of their KV, once a prompt is computed"
        yield {"name": BY_SOURCE, "text": text, "type": "counter", "samples": samples}


def _lora_info(families: Sequence[PlainFamily], now: float) -> Iterator[PlainFamily]:
    """Yield the adapters with requests at each engine. As in vLLM, the value is the time."""
    most: dict[_Labels, float] = {}
    names: dict[_Labels, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for family in families:
        for sample, labels, value in family["samples"]:
            engine = tuple((name, of) for name, of in labels.items() if name != "lora_name")
            if sample == "lora_adapters_max":
                most[engine] = value
            elif sample in _OF_LORA and value:
                names[engine][_OF_LORA[sample]].append(labels["lora_name"])
    samples = [
        [
            LORA_INFO,
            {
                **dict(engine),
                "max_lora": f"{limit:g}",
                **{label: ",".join(names[engine][label]) for label in _OF_LORA.values()},
            },
            now,
        ]
        for engine, limit in most.items()
    ]
    if samples:
        text = "Adapters with requests at an engine, as labels; the value is the time"
        yield {"name": LORA_INFO, "text": text, "type": "gauge", "samples": samples}
