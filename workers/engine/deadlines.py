"""Finds sequences that are past their deadline, without a scan of all sequences. Pure."""

from __future__ import annotations

import heapq
import math

from workers.requests.sequence import SequenceState, SequenceStatus

_MIN_ENTRIES_TO_CLEAN = 256
"""Minimum number of entries of ``Deadlines`` at which entries of ended sequences are removed."""


class Deadlines:
    """A heap of sequences by deadline.

    The entry of a sequence that ends early stays until its deadline, or until the number of entries
    has doubled since the last cleanup.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, SequenceState]] = []  # the number breaks ties
        self._num_added = 0
        self._limit = _MIN_ENTRIES_TO_CLEAN

    def __len__(self) -> int:
        """Number of entries in the heap, including entries of ended sequences."""
        return len(self._heap)

    def add(self, sequence: SequenceState) -> None:
        """Add a sequence; do nothing if the sequence has no deadline."""
        if sequence.deadline == math.inf:
            return
        if len(self._heap) >= self._limit:
            self._heap = [e for e in self._heap if e[2].status is not SequenceStatus.FINISHED]
            heapq.heapify(self._heap)
            self._limit = max(_MIN_ENTRIES_TO_CLEAN, 2 * len(self._heap))
        heapq.heappush(self._heap, (sequence.deadline, self._num_added, sequence))
        self._num_added += 1

    def take_late(self, now: float) -> list[SequenceState]:
        """Remove and return the sequences that are past their deadline and have not ended.

        ``now``: monotonic time in seconds.
        """
        late: list[SequenceState] = []
        while self._heap and self._heap[0][0] <= now:
            sequence = heapq.heappop(self._heap)[2]
            if sequence.status is not SequenceStatus.FINISHED:
                late.append(sequence)
        return late
