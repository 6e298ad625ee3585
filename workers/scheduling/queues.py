"""The sequences of one worker that wait and those that run, each in order. Pure."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from operator import attrgetter

from workers.requests.sequence import SequenceState, SequenceStatus


class SequenceQueues:
    """Keeps the order of waiting and of running sequences, and each one's status."""

    def __init__(self) -> None:
        self.waiting: list[SequenceState] = []
        """By ``SequenceState.order``; only this class changes it."""
        self.running: list[SequenceState] = []
        """Those that have a seat, by the same order; only this class changes it."""

    def by_adapter(self) -> tuple[Counter[str], Counter[str]]:
        """Running and waiting sequences by the key of their adapter; any thread may call it."""
        groups = (tuple(self.running), tuple(self.waiting))
        running, waiting = (Counter(s.request.adapter for s in group) for group in groups)
        return running, waiting

    def wait(self, sequence: SequenceState) -> None:
        """A sequence that is in neither list waits from now on."""
        sequence.status = SequenceStatus.WAITING
        insort(self.waiting, sequence, key=attrgetter("order"))

    def run(self, sequence: SequenceState) -> None:
        """A sequence that is in neither list runs from now on."""
        sequence.status = SequenceStatus.RUNNING
        insort(self.running, sequence, key=attrgetter("order"))

    def remove(self, sequence: SequenceState) -> None:
        """Take a sequence out of its list."""
        is_running = sequence.status is SequenceStatus.RUNNING
        (self.running if is_running else self.waiting).remove(sequence)
