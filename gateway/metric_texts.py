"""What the numbers of workers are: the help texts of their metrics, and which of them go down."""

from __future__ import annotations

GAUGES = frozenset({"kv_blocks_total"})
"""Numbers that are no counters although their names end like one."""
TEXTS = {
    "num_requests_running": "Sequences in the steps of a worker",
    "num_requests_waiting": "Sequences that wait at a worker",
    "num_requests_waiting_by_reason": "Sequences that wait at a worker, by what they wait for",
    "iteration_tokens_total": "Rows of a worker's steps",
    "kv_cache_usage_perc": "Share of the KV blocks that requests hold, 0 to 1",
    "kv_blocks_free": "KV blocks that nobody holds",
    "kv_blocks_total": "KV blocks of a worker",
    "num_preemptions_total": "Running sequences that gave way to others",
    "prefix_cache_queries_total": "Prompt tokens that were looked up, for every choice",
    "prefix_cache_hits_total": "Those of them that were found",
    "prompt_tokens_cached_total": "Prompt tokens that were found, each prompt once",
    "steps_total": "Steps that a worker has committed or served",
    "steps_abandoned_total": "Steps that were given up, and run again",
    "choices_stop_total": "Choices that ended by a stop",
    "choices_length_total": "Choices that ended by their length",
    "choices_abort_total": "Choices that were aborted",
    "choices_error_total": "Choices that failed",
    "kv_migration_seconds": "Fetching of KV blocks from another attention worker",
    "kv_migration_bytes_total": "KV that was fetched from other attention workers",
    "kv_migration_failures_total": "Fetches of KV that failed: the prompt was computed instead",
    "attention_compute_seconds": "A layer's attention and router, one step in 8",
    "dispatch_seconds": "Sending rows of a layer to the experts, one step in 8",
    "combine_seconds": "Waiting for the experts' outputs of a layer, one step in 8",
    "expert_compute_seconds": "Computing the experts of a layer, one step in 8",
    "bubble_seconds": "What a worker waited for others in a step, one step in 8",
    "dispatch_bytes_total": "Bytes that came to an expert worker, and that went home",
    "dispatch_padding_ratio": "Share of these rows for which no expert there had a part",
    "placement_epoch": "Placement epoch that a worker runs",
    "placement_epoch_lag": "Epochs that a worker is behind the newest",
    "cache_config_info": "How the KV cache of a worker is made",
    "expert_worker_tokens_total": "Pairs of a row and an expert that were computed",
    "expert_worker_slots": "Expert slots of a worker in its largest bank",
    "expert_worker_busy_seconds_total": "Time in steps",
    "expert_worker_up": "1 while a worker serves, or is about to",
}
"""By name of the number, histograms by that of the family."""
