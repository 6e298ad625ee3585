"""Which sequences are past their deadline, without a look at all of them. Pure."""

from __future__ import annotations

import heapq
import math

from workers.requests.sequence import SequenceState, SequenceStatus

_LEAST_REBUILT = 256
"""Entries from which on those of sequences that have ended are dropped."""


class Deadlines:
    """The deadlines of sequences, the next one first.

    A sequence that has ended stays until its time comes, or until there are twice as many entries
    as when they were last looked through.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, SequenceState]] = []  # the number decides between equals
        self._num_added = 0
        self._limit = _LEAST_REBUILT

    def __len__(self) -> int:
        """Entries, those of sequences that have ended included."""
        return len(self._heap)

    def add(self, sequence: SequenceState) -> None:
        """Watch a sequence, if it has a deadline."""
        if sequence.deadline == math.inf:
            return
        if len(self._heap) >= self._limit:
            self._heap = [e for e in self._heap if e[2].status is not SequenceStatus.FINISHED]
            heapq.heapify(self._heap)
            self._limit = max(_LEAST_REBUILT, 2 * len(self._heap))
        heapq.heappush(self._heap, (sequence.deadline, self._num_added, sequence))
        self._num_added += 1

    def late(self, now: float) -> list[SequenceState]:
        """Sequences that are past their deadline and have not ended, each once."""
        found: list[SequenceState] = []
        while self._heap and self._heap[0][0] <= now:
            sequence = heapq.heappop(self._heap)[2]
            if sequence.status is not SequenceStatus.FINISHED:
                found.append(sequence)
        return found
