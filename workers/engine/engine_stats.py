"""Metrics of one engine: counters of steps, tokens and ended choices, and gauges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from workers.kv.block_pool import BlockPool
from workers.kv.state_slots import StateSlots
from workers.metrics.histogram import TOKEN_BUCKETS, Histogram
from workers.requests.request import FinishReason
from workers.scheduling.scheduler import Scheduler
from workers.speculation.speculator import Speculator


class EngineStats:
    """Counts steps, tokens and finish reasons, and reads the gauges of an engine's components.

    Any thread may call ``read``.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        pool: BlockPool,
        states: StateSlots | None,
        speculator: Speculator | None,
    ) -> None:
        self._scheduler = scheduler
        self._pool = pool
        self._states = states
        self._speculator = speculator
        steps = ("steps_total", "steps_abandoned_total", "steps_repeated_total")
        tokens = ("prompt_tokens_total", "generation_tokens_total")
        self._counters = dict.fromkeys((*steps, *tokens), 0)
        self._iteration_tokens = Histogram(TOKEN_BUCKETS)
        self._ended = Counter(dict.fromkeys(FinishReason, 0))

    def count(self, name: str, number: int = 1) -> None:
        """Add ``number`` to the counter ``name``, a metric name without prefix."""
        self._counters[name] += number

    def count_step(self, num_rows: int) -> None:
        """Count a committed step of ``num_rows`` rows on this rank."""
        self._counters["steps_total"] += 1
        self._iteration_tokens.observe(num_rows)

    def count_ends(self, reasons: Iterable[FinishReason]) -> None:
        """Count choices that have ended, by finish reason."""
        self._ended.update(reasons)

    def read(self) -> dict[str, float]:
        """Return the gauges and counters by metric name without prefix."""
        free, total = self._pool.num_free, self._pool.num_blocks
        scheduler, admission = self._scheduler, self._scheduler.admission
        prefixes, waiting = scheduler.prefixes, len(scheduler.queues.waiting)
        deferred, for_kv = admission.num_deferred, admission.num_waiting_for_kv
        others = max(waiting - deferred - for_kv, 0)
        return {
            "num_requests_running": float(len(scheduler.queues.running)),
            "num_requests_waiting": float(waiting),
            'num_requests_waiting_by_reason{reason="capacity"}': float(others),
            'num_requests_waiting_by_reason{reason="deferred"}': float(deferred),
            'num_requests_waiting_by_reason{reason="kv"}': float(for_kv),
            **self._iteration_tokens.stats("iteration_tokens_total"),
            "kv_cache_usage_perc": 1 - free / total,
            "kv_blocks_free": float(free),
            "kv_blocks_total": float(total),
            "kv_blocks_kept": float(self._pool.num_kept),
            **self._state_stats(),
            **({} if self._speculator is None else self._speculator.stats()),
            "num_preemptions_total": float(scheduler.preemption.num_preemptions),
            "prefix_cache_queries_total": float(prefixes.num_queried_tokens),
            "prefix_cache_hits_total": float(prefixes.num_hit_tokens),
            "prompt_tokens_cached_total": float(prefixes.num_cached_prompt_tokens),
            **{name: float(count) for name, count in self._counters.items()},
            **{f"choices_{r.value}_total": float(n) for r, n in self._ended.items()},
        }

    def _state_stats(self) -> dict[str, float]:
        states = self._states
        if states is None:
            return {}
        return {
            "recurrent_states_free": float(states.num_free),
            "recurrent_states_total": float(states.num_slots),
        }
