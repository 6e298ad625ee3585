"""The metrics that vLLM has too, under vLLM's names, so that its dashboards show this cluster.

Meanings are the same, and so are labels, but for more of them here (``worker``, ``node``). Names as
of vLLM 0.11 (``vllm/v1/metrics/loggers.py``), with those of older releases that dashboards ask for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cluster.core.metric_families import PlainFamily

PREFIX = "vllm:"
SAME = frozenset(
    {
        "num_requests_running",
        "num_requests_waiting",
        "num_requests_waiting_by_reason",
        "kv_cache_usage_perc",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "num_preemptions",
        "prompt_tokens",
        "prompt_tokens_cached",
        "generation_tokens",
        "request_success",
        "cache_config_info",
        "iteration_tokens_total",
        "request_prompt_tokens",
        "request_generation_tokens",
        "request_max_num_generation_tokens",
        "request_params_n",
        "request_params_max_tokens",
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
"""Families by name, without the prefix and a counter's ``_total``."""
OLDER = {
    "kv_cache_usage_perc": "gpu_cache_usage_perc",
    "prefix_cache_queries": "gpu_prefix_cache_queries",
    "prefix_cache_hits": "gpu_prefix_cache_hits",
    "inter_token_latency_seconds": "time_per_output_token_seconds",
}
"""Older names of the same numbers."""


def as_vllm(families: Iterable[PlainFamily]) -> Iterator[PlainFamily]:
    """The families that vLLM has, also under their older names."""
    for family in families:
        if (name := family["name"]) in SAME:
            yield family
            if (older := OLDER.get(name)) is not None:
                samples = [
                    [older + sample.removeprefix(name), labels, value]
                    for sample, labels, value in family["samples"]
                ]
                yield {**family, "name": older, "samples": samples}
