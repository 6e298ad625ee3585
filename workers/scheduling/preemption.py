"""Preemption of running sequences when KV blocks run short. Pure, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from workers.requests.request import Request
from workers.requests.sequence import SequenceState
from workers.scheduling.admission import SequenceAdmission
from workers.scheduling.block_manager import BlockManager
from workers.scheduling.kv_waits import KvWaits
from workers.scheduling.queues import SequenceQueues
from workers.scheduling.step_intent import Restriction
from workers.scheduling.step_plan import StepBudget

_BLOCKS_AHEAD = 2
"""Number of free KV blocks per running sequence below which a preemption is likely soon."""


class Preemption:
    """Decides which running sequence loses its KV blocks, and makes the sequence wait.

    When blocks run short, the last sequence of the tenant with the most sequences is preempted. The
    sequence later recomputes the part of its prompt and output that was evicted from the cache. The
    first sequence always continues, so that every sequence ends at some time.

    A waiting sequence that does not fit preempts only running sequences of its tenant with a lower
    priority, idle sequences, and, if it must run alone, all other requests. A beam is idle while
    other beams of its request must still be computed. If idle beams kept their blocks, beams of
    several requests could deadlock.
    """

    def __init__(
        self,
        queues: SequenceQueues,
        blocks: BlockManager,
        budget: StepBudget,
        *,
        admission: SequenceAdmission,
        kv_waits: KvWaits,
    ) -> None:
        self._queues = queues
        self._blocks = blocks
        self._budget = budget
        self._admission = admission
        self._kv_waits = kv_waits
        self.num_preemptions = 0
        self.preempted: list[SequenceState] = []
        """Sequences preempted since the last call of ``take_preempted``, oldest first."""

    def candidate(self) -> SequenceState | None:
        """Return the sequence to preempt next, which could move to another worker instead.

        None if no preemption is likely soon. Beams are not returned: a beam search cannot move, as
        it would start again on the other worker.
        """
        running = self._queues.running
        is_short = self._blocks.num_free < _BLOCKS_AHEAD * len(running) and len(running) > 1
        able = [s for s in running if s.params.beams is None]
        return _last_of_largest_tenant(able) if is_short and able else None

    def take_preempted(self) -> list[SequenceState]:
        """Return the sequences preempted since the last call of this method."""
        taken, self.preempted = self.preempted, []
        return taken

    def preempt_for_untried(self, restriction: Restriction) -> None:
        """Preempt sequences for the first waiting sequence, so that its KV blocks can be fetched.

        No effect if no transfer is to be tried for its request, or one request must run alone.
        """
        if not self._kv_waits.has_untried or restriction.solo_request is not None:
            return
        first = self.next_in_need(restriction)
        if first is not None and self._kv_waits.is_untried(first.request.request_id):
            self.preempt_for_next(restriction)

    def preempt_for_next(self, restriction: Restriction) -> None:
        """Preempt sequences until the first waiting sequence fits or no preemption can help."""
        while (first := self.next_in_need(restriction)) is not None:
            if restriction.solo_request is not None:
                self.preempt_last(restriction)
                continue
            lower = [s for s in self._queues.running if _is_preempted_by(s, first.request)]
            self.preempt(lower[-1])

    def next_in_need(self, restriction: Restriction) -> SequenceState | None:
        """Return the first waiting sequence if it fits only after a preemption; else None.

        This sequence may preempt sequences of its tenant with a lower priority, and idle sequences.
        If its request must run alone, it may preempt all sequences of other requests.
        """
        first = self._admission.next_waiting(restriction)
        if first is None:
            return None
        queues, running = self._queues, self._queues.running
        if restriction.solo_request is None:
            if not (queues.num_beams_running or queues.running_by_tenant[first.request.tenant]):
                return None
            stay = [s for s in running if not _is_preempted_by(s, first.request)]
        else:
            stay = [s for s in running if not s.is_idle and restriction.allows(s)]
        if len(stay) == len(running):
            return None
        if first in self._admission.admissible(restriction, self._budget.max_rows):
            return None
        return first if self._blocks.fits_with(first, stay) else None

    def preempt_last(self, restriction: Restriction) -> None:
        """Preempt an idle sequence, else in a solo step a sequence of another request, else any.

        If several qualify, the last sequence of the tenant with the most of them is preempted.
        """
        running = self._queues.running
        idle = [s for s in running if s.is_idle]
        others = [
            s for s in running if restriction.solo_request is None or not restriction.allows(s)
        ]
        self.preempt(_last_of_largest_tenant(idle or others or running))

    def preempt(self, victim: SequenceState) -> None:
        """Free the seat and blocks of the running sequence ``victim``, and let it wait."""
        self._queues.remove(victim)
        self._blocks.release(victim)
        self._queues.wait(victim)
        self._kv_waits.queue(victim.request.request_id)
        self.num_preemptions += 1
        self.preempted.append(victim)


def _is_preempted_by(running: SequenceState, waiting: Request) -> bool:
    """Whether a waiting request may preempt a running sequence: the sequence is idle, or it belongs
    to the same tenant and has a lower priority.
    """
    request = running.request
    has_lower = request.tenant == waiting.tenant and request.priority > waiting.priority
    return running.is_idle or has_lower


def _last_of_largest_tenant(running: Sequence[SequenceState]) -> SequenceState:
    """Return the last sequence in order whose tenant has the most sequences in ``running``."""
    counts = Counter(s.request.tenant for s in running)
    largest = max(counts.values())
    return next(s for s in reversed(running) if counts[s.request.tenant] == largest)
