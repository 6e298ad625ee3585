"""Runs: consecutive rows of a sequence that start from one recurrent state and end in another.
Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StateRun:
    """Consecutive rows of one sequence, between two of its recurrent states."""

    first: int
    """First position in the sequence, or first row of the batch."""
    last: int
    """One past the last position or row."""
    read: int
    """State slot read before the first row."""
    write: int
    """State slot written after the last row."""

    def moved(self, offset: int) -> StateRun:
        """Return the run with ``offset`` added to its positions."""
        return StateRun(self.first + offset, self.last + offset, self.read, self.write)
