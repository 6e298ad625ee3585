"""The leader's part of the step protocol: decides headers, with what it has learned from steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from operator import attrgetter

from cluster.core.topology import Generation
from workers.engine.leader import StepSize, decide_header, step_sizes
from workers.engine.micro_batches import MicroBatchRule
from workers.engine.prefill_cap import PrefillCap
from workers.engine.step_proposals import ProposalTable
from workers.requests.step_header import StepHeader

logger = logging.getLogger(__name__)

_QUIET_S = 3.0
"""Seconds without rows after which steps of padding may run. Requests wait at most 2 s for KV
blocks (``kv_fetch_limit_s``), and a capture takes about a second."""


class StepLeader:
    """Decides the headers of the steps of a generation."""

    def __init__(
        self,
        *,
        prefill_cap: PrefillCap,
        micro_batches: MicroBatchRule,
        buckets: Sequence[int] = (),
        max_static_ranks: int = 0,
    ) -> None:
        """The arguments are policies: the limit of prompt rows over all ranks, the split of a step,
        the sizes to which decode rows are padded, and the largest number of expert ranks that all
        receive all rows of prompts.
        """
        self._prefill_cap = prefill_cap
        self._micro_batches = micro_batches
        self._buckets = buckets
        self._max_static_ranks = max_static_ranks
        self._new_sizes: list[StepSize] = []
        """Sizes that no step of this generation has had."""
        self._had_rows_at = 0.0
        """Monotonic time of the last header with rows, or of the generation's start."""
        self._epoch = 0
        self._oldest_epoch = 0
        self._decided_epoch = 0
        self._running_step: tuple[StepHeader, float] | None = None  # with its start time

    def start_generation(self, generation: Generation, epoch: int) -> None:
        """Drop the state of the old generation; ``epoch`` is the placement epoch."""
        self._generation = generation
        self._running_step = None
        self._epoch = self._oldest_epoch = self._decided_epoch = epoch
        self._new_sizes = []
        if len(generation.members) > 1 and not generation.returns_slots:
            self._new_sizes = list(step_sizes(self._buckets, self._micro_batches))
        self._had_rows_at = time.monotonic()
        self._has_few_ranks = 0 < len(generation.experts) <= self._max_static_ranks

    def set_epoch(self, epoch: int, oldest_epoch: int) -> None:
        """Set the placement epoch of the next headers, and the oldest that steps may use."""
        self._epoch = epoch
        self._oldest_epoch = oldest_epoch

    def decide(
        self, proposals: ProposalTable, step: int, *, even_empty: bool, is_timed: bool
    ) -> StepHeader | None:
        """Decide the header of a step from the proposals of all ranks; None if no step must run.

        The first header with a new epoch runs even if no rank has rows, as with ``even_empty``.
        ``is_timed``: whether the time since the last header is that of one step.
        """
        self._observe_step(is_timed)
        generation = self._generation
        decode_rows = sum(map(attrgetter("decode_rows"), proposals.in_order))
        header = decide_header(
            proposals,
            generation=generation.number,
            step=step,
            epoch=self._epoch,
            oldest_epoch=self._oldest_epoch,
            max_prefill_rows=self._prefill_cap.rows(decode_rows, len(proposals.ranks)),
            micro_batches=self._micro_batches,
            buckets=() if generation.returns_slots else self._buckets,
            has_static_prompts=self._has_few_ranks and not generation.returns_slots,
            even_empty=even_empty or self._epoch != self._decided_epoch,
            idle_size=self._idle_size(),
        )
        if header is not None:
            self._note_step(header)
        return header

    def _idle_size(self) -> StepSize | None:
        """Return the size of a step to run if no rank wants rows; None if there is no new size, or
        a request may soon have rows, which the step would delay."""
        if not self._new_sizes or time.monotonic() - self._had_rows_at < _QUIET_S:
            return None
        return self._new_sizes[0]

    def _note_step(self, header: StepHeader) -> None:
        now = time.monotonic()
        self._running_step = (header, now)
        self._decided_epoch = header.epoch
        if header.decode_rows + header.prefill_rows:
            self._had_rows_at = now
        size = StepSize(header.bucket, header.num_micro_batches)
        if size in self._new_sizes and not header.edge_limit:
            self._new_sizes.remove(size)
            if not self._new_sizes:
                logger.info("steps of every size have run and are captured")

    def _observe_step(self, is_timed: bool) -> None:
        """Record the time of the previous step, as all ranks have proposed again."""
        if self._running_step is None:
            return
        (header, start), self._running_step = self._running_step, None
        if is_timed:
            seconds = time.monotonic() - start
            self._prefill_cap.observe(header.decode_rows, header.prefill_rows, seconds)
