"""The waiting and running sequences of one worker, each in order. Pure."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from operator import attrgetter

from workers.requests.sequence import SequenceState, SequenceStatus


class SequenceQueues:
    """Keeps the waiting and running sequences in order and sets their status."""

    def __init__(self) -> None:
        self.waiting: list[SequenceState] = []
        """Waiting sequences, by ``SequenceState.order``; only this class changes the list."""
        self.running: list[SequenceState] = []
        """Running sequences (with a seat), by ``SequenceState.order``; only this class changes the
        list."""

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
        insort(self.waiting, sequence, key=attrgetter("order"))

    def run(self, sequence: SequenceState) -> None:
        """Add a sequence, which is in neither list, to the running sequences."""
        sequence.status = SequenceStatus.RUNNING
        insort(self.running, sequence, key=attrgetter("order"))

    def remove(self, sequence: SequenceState) -> None:
        """Remove a sequence from ``waiting`` or ``running``, whichever its status names."""
        is_running = sequence.status is SequenceStatus.RUNNING
        (self.running if is_running else self.waiting).remove(sequence)
