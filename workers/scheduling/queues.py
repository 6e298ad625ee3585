"""The waiting and running sequences of one worker, each in order. Pure."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from operator import attrgetter

from workers.requests.sequence import SequenceState, SequenceStatus
from workers.scheduling.fairness import ServedTokens
from workers.scheduling.step_intent import Restriction
from workers.scheduling.waiting_turns import WaitingTurns, remove_in_order

_ORDER = attrgetter("order")


class SequenceQueues:
    """Keeps the waiting and running sequences in order, counts them, and sets their status."""

    def __init__(self, served: ServedTokens) -> None:
        """``served``: counts of the tokens that each tenant was served, for their turns."""
        self.waiting: list[SequenceState] = []
        """Waiting sequences, by ``SequenceState.order``; only this class changes the list."""
        self.running: list[SequenceState] = []
        """Running sequences (with a seat), by ``SequenceState.order``; only this class changes the
        list."""
        self.turns = WaitingTurns(served)
        """Waiting sequences in the order in which tenants take turns."""
        self.running_by_tenant: Counter[str] = Counter()
        """Number of running sequences of each tenant that has any."""
        self.num_beams_running = 0
        """Number of running sequences that are beams."""
        self.num_waiting_tokens = 0
        """Number of prompt tokens of waiting requests, counted once for all choices."""
        self.num_changes = 0
        """Number of changes of the lists, and of commits, since the start. While it stays the same,
        so does the result of ``runnable``: beams become idle or continue only at the end of a
        commit, before the next intent."""
        self._with_output: set[SequenceState] = set()

    @property
    def has_waiting_output(self) -> bool:
        """Whether a sequence waits that had output when it began to wait."""
        return bool(self._with_output)

    def runnable(self, restriction: Restriction) -> tuple[list[SequenceState], list[SequenceState]]:
        """Return the running sequences that may have rows: the decoding ones, and all others."""
        able = self.running
        if self.num_beams_running:
            able = [s for s in able if not s.is_idle]
        if not restriction.is_open:
            able = [s for s in able if restriction.allows(s)]
        decoding = [s for s in able if s.is_decoding]
        if len(decoding) == len(able):
            return decoding, []
        return decoding, [s for s in able if not s.is_decoding]

    def note_commit(self) -> None:
        """Record that a step was committed, so that other sequences may decode."""
        self.num_changes += 1

    def by_adapter(self) -> tuple[Counter[str], Counter[str]]:
        """Return the numbers of running and of waiting sequences by LoRA adapter key.

        Any thread may call this method.
        """
        groups = (tuple(self.running), tuple(self.waiting))
        running, waiting = (Counter(s.request.adapter for s in group) for group in groups)
        return running, waiting

    def wait(self, sequence: SequenceState) -> None:
        """Add a sequence, which is in neither list, to the waiting sequences."""
        sequence.status = SequenceStatus.WAITING
        insort(self.waiting, sequence, key=_ORDER)
        self.turns.add(sequence)
        if sequence.output:
            self._with_output.add(sequence)
        self._count_waiting(sequence, 1)

    def run(self, sequence: SequenceState) -> None:
        """Add a sequence, which is in neither list, to the running sequences."""
        sequence.status = SequenceStatus.RUNNING
        insort(self.running, sequence, key=_ORDER)
        self._count_running(sequence, 1)

    def remove(self, sequence: SequenceState) -> None:
        """Remove a sequence from ``waiting`` or ``running``, whichever its status names."""
        if sequence.status is SequenceStatus.RUNNING:
            remove_in_order(self.running, sequence)
            self._count_running(sequence, -1)
            return
        remove_in_order(self.waiting, sequence)
        self.turns.remove(sequence)
        self._with_output.discard(sequence)
        self._count_waiting(sequence, -1)

    def check_integrity(self, served: ServedTokens) -> None:
        """Assert that all counts are those of the lists, and the turns those of ``served``; for
        tests."""
        running, waiting = self.running, self.waiting
        assert self.running_by_tenant == Counter(s.request.tenant for s in running)
        assert self.num_beams_running == sum(s.params.beams is not None for s in running)
        tokens = sum(s.prompt_length for s in waiting if s.first_choice is None)
        assert self.num_waiting_tokens == tokens
        assert self._with_output <= set(waiting)
        assert list(self.turns) == list(served.in_turn(waiting)), "turns are out of order"

    def _count_waiting(self, sequence: SequenceState, sign: int) -> None:
        self.num_changes += 1
        if sequence.first_choice is None:
            self.num_waiting_tokens += sign * sequence.prompt_length

    def _count_running(self, sequence: SequenceState, sign: int) -> None:
        self.num_changes += 1
        self.num_beams_running += sign * (sequence.params.beams is not None)
        tenant = sequence.request.tenant
        self.running_by_tenant[tenant] += sign
        if not self.running_by_tenant[tenant]:
            del self.running_by_tenant[tenant]
