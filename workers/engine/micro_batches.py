"""Decides whether the leader splits a step into two micro-batches. Pure.

While the expert workers compute one micro-batch, the attention workers compute the other. But every
micro-batch runs each layer's operations and reads the expert weights again, so splitting a small
batch makes it slower. ``benchmarks/serving/micro_batches.py`` measures the break-even point.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.config.cluster import EngineSection, NumMicroBatches
from cluster.config.workers import WorkersSection


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatchRule:
    """The leader's policy for the number of micro-batches (1 or 2) of a step."""

    setting: NumMicroBatches = 1
    """Number of micro-batches of all steps; ``auto`` decides by the rows of each step."""
    decode_threshold: int = 0
    """With ``auto``, a step without prompt rows is split if a rank has at least so many rows."""
    prefill_threshold: int = 0
    """With ``auto``, a step with prompt rows is split if a rank has at least so many rows."""

    @classmethod
    def of(cls, engine: EngineSection, workers: WorkersSection) -> MicroBatchRule:
        """Create the rule for a configuration.

        Without separate expert workers there is nothing to overlap, and workers that share a core
        take turns anyway; in both cases ``auto`` means 1. ``workers`` must have the shares of cores
        that ``plan_start`` sets.
        """
        setting = engine.num_micro_batches
        if setting == "auto" and not _can_overlap(workers):
            setting = 1
        return cls(
            setting=setting,
            decode_threshold=engine.micro_batch_decode_threshold,
            prefill_threshold=engine.micro_batch_prefill_threshold,
        )

    def choose(self, max_rows: int, has_prefill: bool) -> int:
        """Return the number of micro-batches of a step, 1 or 2.

        ``max_rows``: largest number of rows of an attention rank. If no rank has more than one row,
        the step cannot be split: no rank would have rows in the second micro-batch.
        """
        if max_rows < 2 or self.setting == 1:
            return 1
        threshold = self.prefill_threshold if has_prefill else self.decode_threshold
        return 2 if self.setting == 2 or max_rows >= threshold else 1


def _can_overlap(workers: WorkersSection) -> bool:
    """Whether attention workers and expert workers can compute at the same time."""
    cpus = workers.cpus_per_worker
    has_own_core = workers.device == "cuda" or cpus is None or cpus >= 1
    return workers.mode == "disaggregated" and has_own_core
