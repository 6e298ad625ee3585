"""Admission of waiting sequences to a step. Pure, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from workers.requests.sequence import SequenceState, SequenceStatus
from workers.scheduling.block_manager import BlockManager
from workers.scheduling.kv_waits import KvWaits
from workers.scheduling.queues import SequenceQueues
from workers.scheduling.seat_reserve import RESERVED_DIVISOR, SeatReserve
from workers.scheduling.step_intent import Restriction
from workers.scheduling.step_plan import StepBudget

_MAX_FETCH_STEPS = 8
"""Maximum prompt rows of waiting requests for which KV blocks are fetched ahead, as a multiple of
the rows of the largest step."""


class SequenceAdmission:
    """Decides which waiting sequences fit into a step, in which order, and admits them to run.

    Tenants take turns (``fairness``). The sequences of a tenant are ordered by priority (lower
    values first), then by origin (moved from another worker first), then by arrival. An admission
    leaves one free KV block for each running sequence that may still grow, so that no sequence is
    preempted in the step after its admission.
    """

    def __init__(
        self,
        queues: SequenceQueues,
        blocks: BlockManager,
        budget: StepBudget,
        *,
        kv_waits: KvWaits,
        seats: SeatReserve,
    ) -> None:
        self._queues = queues
        self._blocks = blocks
        self._budget = budget
        self._kv_waits = kv_waits
        self._seats = seats

    @property
    def num_deferred(self) -> int:
        """Number of waiting sequences for which the first choice of their request must compute the
        prompt before they start."""
        return sum(map(self._waits_for_first_choice, self._queues.waiting))

    @property
    def num_waiting_for_kv(self) -> int:
        """Number of sequences that wait for a transfer of KV blocks, without sequences that wait
        for the first choice of their request."""
        if not self._kv_waits.is_any_waiting:
            return 0
        return sum(map(self._waits_for_kv, self._queues.waiting))

    def take_admissible(self, restriction: Restriction, at_most: int) -> list[SequenceState]:
        """Return up to ``at_most`` waiting requests that can run soon, as one sequence of each.

        They fit into the next few steps, the seats and the free blocks. A request is returned only
        once after it was queued or preempted.
        """
        if not self._kv_waits.has_untried:
            return []
        able: dict[str, SequenceState] = {}
        for sequence in self.admissible(restriction, _MAX_FETCH_STEPS * self._budget.max_rows):
            able.setdefault(sequence.request.request_id, sequence)
        return [able[name] for name in self._kv_waits.take_untried(able, at_most)]

    def admissible(self, restriction: Restriction, max_rows: int) -> Iterator[SequenceState]:
        """Yield the waiting sequences, in turn, that together fit into seats, free blocks and rows.

        ``max_rows``: rows for all of them; the last sequence may exceed it. A cached block without
        references counts as a free block that the sequence takes. A tenant above its share leaves
        some seats free for other tenants, and blocks for the same number of sequences, but at most
        one in ``RESERVED_DIVISOR`` blocks.
        """
        blocks, running = self._blocks, self._queues.running
        seats = self._budget.max_num_seqs - len(running)
        if not self._queues.waiting or not seats:
            return
        free = blocks.num_free - blocks.reserve(running)
        is_solo = restriction.solo_request is not None
        counts = Counter[str]() if is_solo else self._queues.running_by_tenant
        left_free = self._seats.seats_left_free(counts)
        held_back: set[str] = set()  # tenants
        for sequence in self._queues.turns:
            if seats <= 0 or max_rows <= 0:
                return
            num_left, tenant = left_free.of(sequence), sequence.request.tenant
            if seats > num_left and self._waits_for_kv(sequence):
                seats -= 1
                free -= self._num_blocks_to_keep(sequence) + blocks.reserve((sequence,))
                continue
            if not self._may_run(sequence, restriction) or seats <= num_left or tenant in held_back:
                continue
            known = blocks.cached_blocks(sequence)
            if self._waits_for_first_choice(sequence) and not blocks.has_shared(sequence, known):
                continue
            spare = min(
                num_left * blocks.num_blocks_of(sequence), blocks.num_blocks // RESERVED_DIVISOR
            )
            taken = blocks.num_to_take(sequence, known)
            if num_left and free - taken < spare:
                held_back.add(tenant)
                continue
            free -= taken
            if free < 0:
                return
            free -= blocks.reserve((sequence,))
            left_free.take(sequence)
            seats -= 1
            max_rows -= blocks.num_to_compute(sequence, known)
            yield sequence

    def ready_to_decode(self, restriction: Restriction, max_rows: int) -> list[SequenceState]:
        """Return the admissible sequences whose first row after the admission is a decode row.

        ``max_rows``: limit of rows, as for ``admissible``.
        """
        if not self._queues.has_waiting_output:
            return []
        return [s for s in self.admissible(restriction, max_rows) if self.would_decode(s)]

    def would_decode(self, waiting: SequenceState) -> bool:
        """Whether the first row of a waiting sequence would be a decode row: all its tokens except
        the newest output token are cached, as after most moves to this worker."""
        return bool(waiting.output) and self._blocks.num_to_compute(waiting) == 1

    def next_waiting(self, restriction: Restriction) -> SequenceState | None:
        """Return the waiting sequence that is next in turn, even if it does not fit; None if no
        sequence may run."""
        able = (s for s in self._queues.turns if self._may_run(s, restriction))
        return next((s for s in able if not self._waits_for_first_choice(s)), None)

    def still_fits(self, admissible: SequenceState) -> bool:
        """Whether a sequence that ``admissible`` yielded still fits after other admissions."""
        return self._blocks.still_fits(admissible, self._queues.running)

    def admit(self, sequence: SequenceState) -> int:
        """Move a waiting sequence to the running sequences, with a seat and blocks.

        Returns the number of KV blocks that were newly allocated.
        """
        num_allocated = self._blocks.admit(sequence)
        self._queues.remove(sequence)
        self._kv_waits.forget(sequence.request.request_id)
        self._queues.run(sequence)
        return num_allocated

    def can_fork(self, parent: SequenceState, child: SequenceState) -> bool:
        """Whether ``child``, a beam forked from ``parent``, can run in the next step.

        ``parent`` must be running, and a seat and enough blocks must be free.
        """
        running = self._queues.running
        has_seat = len(running) < self._budget.max_num_seqs
        is_running = parent.status is SequenceStatus.RUNNING
        return is_running and has_seat and self._blocks.can_fork(child, running)

    def _may_run(self, waiting: SequenceState, restriction: Restriction) -> bool:
        is_able = not waiting.is_idle and waiting.request.request_id not in self._kv_waits
        return is_able and restriction.allows(waiting)

    def _waits_for_kv(self, sequence: SequenceState) -> bool:
        """Whether the sequence waits for a transfer of KV blocks, and not also for the first choice
        of its request."""
        is_held = sequence.request.request_id in self._kv_waits
        return is_held and not self._waits_for_first_choice(sequence)

    def _num_blocks_to_keep(self, sequence: SequenceState) -> int:
        """Number of free blocks to keep for a sequence that waits for KV blocks, in addition to the
        blocks that its transfer holds."""
        coming = self._kv_waits.num_fetching(sequence.request.request_id)
        return max(self._blocks.num_blocks_of(sequence) - coming, 0)

    def _waits_for_first_choice(self, sequence: SequenceState) -> bool:
        """Whether the first choice of the sequence's request must still compute full blocks of the
        prompt, which the sequence will share."""
        first = sequence.first_choice
        if first is None or first.is_idle or first.status is SequenceStatus.FINISHED:
            return False
        return first.num_computed < self._blocks.num_shared_tokens(sequence)
