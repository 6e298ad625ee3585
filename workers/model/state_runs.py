"""Runs: consecutive rows of a sequence that start from one recurrent state and end in another."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StateRun:
    """Consecutive rows of one sequence, between two stored recurrent states of the sequence."""

    first: int
    """Position of the first row in the sequence or, for a run in a batch, in the batch."""
    last: int
    """One past the position of the last row."""
    read: int
    """Slot of the recurrent state that is read before the first row."""
    write: int
    """Slot to which the recurrent state is written after the last row."""

    def moved(self, offset: int) -> StateRun:
        """Return a copy of the run with ``offset`` added to ``first`` and ``last``."""
        return StateRun(self.first + offset, self.last + offset, self.read, self.write)
