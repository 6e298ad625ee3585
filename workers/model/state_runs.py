"""Rows between two recurrent states of a sequence: planned as positions, computed as rows. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StateRun:
    """Neighbouring rows of one sequence, between two of its recurrent states."""

    first: int
    """Position in the sequence, or row of the batch, of the first one."""
    last: int
    """One past the last one."""
    read: int
    """Slot of the state before the first row."""
    write: int
    """Slot of the state after the last one."""

    def moved(self, offset: int) -> StateRun:
        """The same run, counted from elsewhere."""
        return StateRun(self.first + offset, self.last + offset, self.read, self.write)
