"""When the leader splits a step into two micro-batches. Pure.

While the experts work on one, attention works on the other. The price: every micro-batch calls each
layer's operations and reads its experts again, so a small batch is slower in two parts.
``benchmarks/serving/micro_batches.py`` measures where two begin to pay.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from cluster.config.cluster import EngineSection, NumMicroBatches
from cluster.config.workers import WorkersSection


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatchRule:
    """The leader's policy."""

    setting: NumMicroBatches = 1
    """``auto`` decides by the rows of each step, a number is kept for all of them."""
    decode_threshold: int = 0
    """Rows of the busiest attention rank from which ``auto`` splits a step of decodes only."""
    prefill_threshold: int = 0
    """The same for a step in which any rank has prompt rows."""

    @classmethod
    def of(cls, engine: EngineSection, workers: WorkersSection) -> MicroBatchRule:
        """What a configuration asks for.

        Without separate expert workers there is nothing to overlap with, and workers that share a
        core alternate anyway: ``auto`` is 1 then. ``workers`` has its shares resolved.
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
        most = max(rows)
        if most < 2 or self.setting == 1:
            return 1
        threshold = self.prefill_threshold if has_prefill else self.decode_threshold
        return 2 if self.setting == 2 or most >= threshold else 1


def _can_overlap(workers: WorkersSection) -> bool:
    """Whether attention and experts can compute at the same time."""
    cpus = workers.cpus_per_worker
    has_own_core = workers.device == "cuda" or cpus is None or cpus >= 1
    return workers.mode == "disaggregated" and has_own_core
