"""When the leader splits a step into two micro-batches. Pure.

While the expert workers compute one, the attention workers compute the other. But every micro-batch
runs each layer's operations and reads the expert weights again, so splitting a small batch makes it
slower. ``benchmarks/serving/micro_batches.py`` measures the break-even point.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from cluster.config.cluster import EngineSection, NumMicroBatches
from cluster.config.workers import WorkersSection


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatchRule:
    """The leader's policy for the number of micro-batches."""

    setting: NumMicroBatches = 1
    """``auto`` decides by the rows of each step; a number applies to all steps."""
    decode_threshold: int = 0
    """Rows of the busiest attention rank from which ``auto`` splits a step without prompt rows."""
    prefill_threshold: int = 0
    """Rows of the busiest attention rank from which ``auto`` splits a step with prompt rows."""

    @classmethod
    def of(cls, engine: EngineSection, workers: WorkersSection) -> MicroBatchRule:
        """Create the rule for a configuration.

        Without separate expert workers there is nothing to overlap, and workers that share a core
        take turns anyway; in both cases ``auto`` means 1. ``workers`` must have resolved shares.
        """
        setting = engine.num_micro_batches
        if setting == "auto" and not _can_overlap(workers):
            setting = 1
        return cls(
            setting=setting,
            decode_threshold=engine.micro_batch_decode_threshold,
            prefill_threshold=engine.micro_batch_prefill_threshold,
        )

    def choose(self, rows: Collection[int], has_prefill: bool) -> int:
        """Number of micro-batches of a step with these numbers of rows on the attention ranks.

        One row cannot be split: no rank would have rows in the second part.
        """
        max_rows = max(rows)
        if max_rows < 2 or self.setting == 1:
            return 1
        threshold = self.prefill_threshold if has_prefill else self.decode_threshold
        return 2 if self.setting == 2 or max_rows >= threshold else 1


def _can_overlap(workers: WorkersSection) -> bool:
    """Whether attention and experts can compute at the same time."""
    cpus = workers.cpus_per_worker
    has_own_core = workers.device == "cuda" or cpus is None or cpus >= 1
    return workers.mode == "disaggregated" and has_own_core
