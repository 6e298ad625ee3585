"""Prometheus metrics of the cluster: the controller's metrics, and the workers' stats."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cluster.core.metric_families import PlainFamily
from cluster.core.states import GONE, ClusterState, WorkerState
from cluster.core.topology import holds_experts, runs_attention
from gateway.cluster.view import Snapshot

_LABEL = r'[a-z_]+="[^"\\\n]*"'
_LEGAL_NAME = re.compile(rf"([a-zA-Z_][a-zA-Z0-9_]*)(?:\{{({_LABEL}(?:,{_LABEL})*)\}})?")
"""Matches the name of a worker's stat, with or without labels."""
_HISTOGRAM = re.compile("(.+)_(?:bucket|count|sum)")
"""Matches a stat of a histogram; the first group is the histogram's name."""
_MAX_STAT_NAMES = 4096
"""Maximum number of cached names of stats. All workers have the same names."""
_GAUGES = frozenset({"kv_blocks_total", "recurrent_states_total"})
"""Gauges whose names end in ``_total`` as names of counters do."""
WORKER_TEXTS = {
    "num_requests_running": "Sequences in the running batch of a worker",
    "num_requests_waiting": "Sequences waiting at a worker",
    "num_requests_waiting_by_reason": "Sequences waiting at a worker, by reason",
    "iteration_tokens_total": "Tokens per step of a worker",
    "kv_cache_usage_perc": "Fraction of a worker's KV blocks in use, 0 to 1",
    "kv_blocks_free": "Free KV blocks",
    "kv_blocks_total": "KV blocks of a worker",
    "kv_blocks_kept": "Free KV blocks that are kept longer than others, as a request asked",
    "recurrent_states_free": "Recurrent states that no sequence uses, including cached ones",
    "recurrent_states_total": "Recurrent states of a worker, if its model has any",
    "num_preemptions_total": "Preempted sequences",
    "prefix_cache_queries_total": "Prompt tokens looked up in the prefix cache, for each choice",
    "prefix_cache_hits_total": "Prompt tokens found in the prefix cache, for each choice",
    "spec_decode_num_drafts_total": "Speculative drafts that were run",
    "spec_decode_num_draft_tokens_total": "Tokens of the speculative drafts that were run",
    "spec_decode_num_accepted_tokens_total": "Tokens of speculative drafts that were accepted",
    "spec_decode_num_accepted_tokens_per_pos_total": "Accepted draft tokens by position, from 0",
    "spec_decode_num_withheld_drafts_total": "Drafts not run, as they would lower the throughput",
    "spec_decode_row_price": "Minimum probability of acceptance for a draft row to run",
    "lora_adapters_loaded": "LoRA adapters in a worker's memory",
    "lora_adapters_max": "Maximum number of LoRA adapters that are loaded at a time",
    "lora_adapters_bytes": "Memory of a worker's LoRA adapters",
    "lora_requests_running": "Sequences in the running batch of a worker, by LoRA adapter",
    "lora_requests_waiting": "Sequences waiting at a worker, by LoRA adapter",
    "steps_total": "Steps that an attention worker committed or an expert worker served",
    "steps_abandoned_total": "Steps that were abandoned and run again",
    "steps_repeated_total": "Steps run again, as they needed more rows than an edge limit allows",
    "choices_stop_total": "Choices that ended at a stop string, stop token or end of sequence",
    "choices_length_total": "Choices that ended at their maximum length",
    "choices_abort_total": "Choices that were aborted",
    "choices_error_total": "Choices that failed",
    "kv_migration_seconds": "Time to fetch KV blocks from another attention worker",
    "kv_migration_bytes_total": "Bytes of KV blocks fetched from other attention workers",
    "kv_migration_failures_total": "Failed fetches of KV blocks from other attention workers",
    "kv_tier_bytes": "Size of the KV blocks and states in a tier of a worker, in bytes",
    "kv_tier_capacity_bytes": "Capacity of a tier of a worker, in bytes",
    "kv_tier_usable": "1 while blocks can be written to a tier on disk, else 0",
    "kv_tier_skipped_total": "KV blocks and states that a tier had no space or time for",
    "kv_tier_broken_total": "KV blocks and states that a tier could not restore",
    "kv_restore_seconds": "Time to restore the blocks of a request from a tier",
    "kv_restore_tokens_total": "Prompt tokens whose KV blocks were restored from a tier",
    "kv_restore_bytes_total": "Bytes restored from a tier",
    "session_copies_total": "Copies of sessions of other attention workers, by outcome",
    "session_copies_waiting": "Copies of sessions that a worker has not begun to fetch",
    "session_copy_blocks_total": "KV blocks of sessions that were copied to host memory",
    "attention_compute_seconds": "Time of attention and router per layer; every 8th step is timed",
    "dispatch_seconds": "Time to send a layer's tokens to the experts; every 8th step is timed",
    "combine_seconds": "Time to wait for a layer's expert outputs; every 8th step is timed",
    "expert_compute_seconds": "Time of expert computation per layer; every 8th step is timed",
    "bubble_seconds": "Time per step that a worker waited for others; every 8th step is timed",
    "dispatch_bytes_total": "Bytes received (dispatch) and returned (combine) by an expert worker",
    "dispatch_padding_ratio": "Fraction of padding in the rows exchanged with an expert worker",
    "placement_epoch": "Active placement epoch of a worker",
    "placement_epoch_lag": "Number of placement epochs by which a worker is behind the newest",
    "cache_config_info": "Configuration of a worker's KV cache",
    "gpu_memory_used_bytes": "Memory in use of a worker's GPU, by all processes",
    "gpu_memory_total_bytes": "Memory of a worker's GPU",
    "gpu_utilization_perc": "Fraction of time that a worker's GPU was busy, 0 to 1",
    "expert_worker_tokens_total": "Token-expert pairs that an expert worker has computed",
    "expert_worker_slots": "Expert slots of a worker in its largest bank",
    "expert_weights_read_bytes_total": "Bytes of expert weights that a worker has read, by source",
    "expert_worker_busy_seconds_total": "Time that an expert worker spent in steps",
    "expert_worker_slot_seconds_total": "Time in which a worker computed activated expert slots",
    "expert_worker_up": "1 while an expert worker is ready or serving, else 0",
}
"""Help text of each metric, by name; for a histogram, the name of its family."""
MAX_HISTOGRAM_RANKS = 16
"""Number of workers of each role with histograms, so that 128 workers do not have 30,000 series."""
REST = "rest"
"""Value of a label for the sum over all that have no series of their own."""
TOTAL_TEXTS = {
    "cluster_requests_running": "Sequences in the running batches of all attention workers",
    "cluster_requests_waiting": "Sequences waiting at all attention workers",
    "cluster_kv_cache_usage_perc": "Fraction of all attention workers' KV blocks in use, 0 to 1",
}
"""Help text of each gauge of the whole cluster. Autoscalers and endpoint pickers compare clusters
by these gauges."""


def cluster_families(
    snapshot: Snapshot, taken: Collection[str], cache_config: Mapping[str, str]
) -> Iterator[PlainFamily]:
    """Yield the controller's metrics and the workers' stats. A family may be in several parts.

    Args:
        snapshot: the controller's latest snapshot.
        taken: names of stats to omit, because the gateway counts them itself.
        cache_config: labels of ``cache_config_info``.
    """
    current = snapshot.get("state")
    yield {
        "name": "cluster_state",
        "text": "1 for the current state of the cluster",
        "type": "gauge",
        "samples": [
            ["cluster_state", {"state": state.value}, float(state.value == current)]
            for state in ClusterState
        ],
    }
    yield from snapshot.get("metrics", ())
    epoch = int(snapshot.get("placement_epoch") or 0)
    for worker in snapshot.get("workers", ()):
        labels, has_histograms = _labels(worker), int(worker["rank"]) < MAX_HISTOGRAM_RANKS
        for key, value in _worker_stats(worker, epoch, cache_config).items():
            if (number := _parse(key)) is None or number.name in taken:
                continue
            if has_histograms or number.family["type"] != "histogram":
                samples = [[number.name, {**labels, **number.labels}, value]]
                yield {**number.family, "samples": samples}
    yield from _totals(snapshot)


def histogram_label(engine: str) -> str:
    """Return the label ``engine`` of histograms of calls: ``rest`` for all attention workers from
    the rank ``MAX_HISTOGRAM_RANKS`` on."""
    return REST if engine.isdecimal() and int(engine) >= MAX_HISTOGRAM_RANKS else engine


def _totals(snapshot: Snapshot) -> Iterator[PlainFamily]:
    """Yield sums over the live attention workers; nothing before the first report."""
    living = [
        worker
        for worker in snapshot.get("workers", ())
        if runs_attention(worker["role"]) and WorkerState(worker["state"]) not in GONE
    ]
    stats = [worker["stats"] for worker in living if worker.get("stats")]
    if not stats:
        return
    totals = {
        f"cluster_requests_{kind}": sum(s.get(f"num_requests_{kind}", 0.0) for s in stats)
        for kind in ("running", "waiting")
    }
    if total := sum(worker.get("kv_blocks_total") or 0 for worker in living):
        free = sum(worker.get("kv_blocks_free") or 0 for worker in living)
        totals["cluster_kv_cache_usage_perc"] = 1.0 - free / total
    for name, value in totals.items():
        samples = [[name, {}, float(value)]]
        yield {"name": name, "text": TOTAL_TEXTS[name], "type": "gauge", "samples": samples}


def _worker_stats(
    worker: Mapping[str, Any], epoch: int, cache_config: Mapping[str, str]
) -> dict[str, float]:
    if (state := WorkerState(worker["state"])) in GONE:  # its last stats are no longer valid
        is_missed = state is WorkerState.LOST and holds_experts(worker["role"])
        return {"expert_worker_up": 0.0} if is_missed else {}
    numbers = {name: float(value) for name, value in (worker.get("stats") or {}).items()}
    own = numbers.setdefault("placement_epoch", epoch)
    numbers["placement_epoch_lag"] = max(epoch - own, 0.0)
    if holds_experts(worker["role"]):
        numbers["expert_worker_up"] = float(state in (WorkerState.READY, WorkerState.SERVING))
        numbers["expert_worker_slots"] = float(worker.get("slots") or 0)
    if runs_attention(worker["role"]) and cache_config:
        config = {**cache_config, "num_blocks": worker.get("kv_blocks_total") or 0}
        labels = ",".join(f'{name}="{value}"' for name, value in config.items())
        numbers[f"cache_config_info{{{labels}}}"] = 1.0
    if worker.get("kv_usage") is not None:
        numbers.setdefault("kv_cache_usage_perc", float(worker["kv_usage"]))
    return numbers


def _labels(worker: Mapping[str, Any]) -> dict[str, str]:
    return {
        "engine": str(worker["rank"]) if runs_attention(worker["role"]) else "",
        "worker": str(worker["name"]),
        "node": str(worker.get("node") or ""),
    }


@dataclass(frozen=True, slots=True)
class _WorkerStat:
    """The parsed name of a worker's stat."""

    name: str
    labels: Mapping[str, str]
    family: PlainFamily


@lru_cache(maxsize=_MAX_STAT_NAMES)
def _parse(key: str) -> _WorkerStat | None:
    """Parse a name; None if it is invalid, as workers of another release may send any name."""
    if (match := _LEGAL_NAME.fullmatch(key)) is None:
        return None
    return _WorkerStat(match[1], _labels_of(match[2] or ""), _family(match[1]))


def _labels_of(text: str) -> dict[str, str]:
    """Parse labels in the exposition format, without braces."""
    pairs = (label.split("=", 1) for label in re.findall(_LABEL, text))
    return {name: value.strip('"') for name, value in pairs}


def _family(name: str) -> PlainFamily:
    """Make the family of a worker's stat, without samples."""
    if histogram := _HISTOGRAM.fullmatch(name):
        return {
            "name": histogram[1],
            "text": WORKER_TEXTS.get(histogram[1], histogram[1]),
            "type": "histogram",
        }
    is_counter = name.endswith("_total") and name not in _GAUGES
    family = name.removesuffix("_total") if is_counter else name
    return {
        "name": family,
        "text": WORKER_TEXTS.get(name, name),
        "type": "counter" if is_counter else "gauge",
    }
