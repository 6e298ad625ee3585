"""Metrics of workers: their help texts, and those that are gauges in spite of their names."""

from __future__ import annotations

GAUGES = frozenset({"kv_blocks_total"})
"""Gauges whose names end like those of counters."""
TEXTS = {
    "num_requests_running": "Sequences in the running batch of a worker",
    "num_requests_waiting": "Sequences waiting at a worker",
    "num_requests_waiting_by_reason": "Sequences waiting at a worker, by reason",
    "iteration_tokens_total": "Tokens per step of a worker",
    "kv_cache_usage_perc": "Share of KV blocks in use, 0 to 1",
    "kv_blocks_free": "Free KV blocks",
    "kv_blocks_total": "KV blocks of a worker",
    "num_preemptions_total": "Preempted sequences",
    "prefix_cache_queries_total": "Prompt tokens looked up in the prefix cache, for every choice",
    "prefix_cache_hits_total": "Prompt tokens found in the prefix cache, for every choice",
    "prompt_tokens_cached_total": "Prompt tokens found in the prefix cache, each prompt once",
    "steps_total": "Steps that a worker has committed or served",
    "steps_abandoned_total": "Steps that were abandoned and run again",
    "choices_stop_total": "Choices that ended at a stop string, stop token or end of sequence",
    "choices_length_total": "Choices that ended at their maximum length",
    "choices_abort_total": "Choices that were aborted",
    "choices_error_total": "Choices that failed",
    "kv_migration_seconds": "Time to fetch KV blocks from another attention worker",
    "kv_migration_bytes_total": "Bytes of KV blocks fetched from other attention workers",
    "kv_migration_failures_total": "Failed fetches of KV blocks, whose prompts were computed",
    "attention_compute_seconds": "Time of attention and router per layer, one step in 8",
    "dispatch_seconds": "Time to dispatch the tokens of a layer to the experts, one step in 8",
    "combine_seconds": "Time waiting for the expert outputs of a layer, one step in 8",
    "expert_compute_seconds": "Time of expert computation per layer, one step in 8",
    "bubble_seconds": "Time per step that a worker waited for other workers, one step in 8",
    "dispatch_bytes_total": "Bytes received (dispatch) and returned (combine) by an expert worker",
    "dispatch_padding_ratio": "Share of padding in the rows exchanged with an expert worker",
    "placement_epoch": "Placement epoch in force at a worker",
    "placement_epoch_lag": "Placement epochs between a worker and the newest",
    "cache_config_info": "Configuration of a worker's KV cache",
    "expert_worker_tokens_total": "Pairs of token and expert computed",
    "expert_worker_slots": "Expert slots of a worker in its largest bank",
    "expert_worker_busy_seconds_total": "Time that an expert worker spent in steps",
    "expert_worker_up": "1 while a worker is ready or serves",
}
"""By name of the metric; a histogram's samples share the name of their family."""
