"""Rows that are wanted, and no step: the last resort where no edge breaks and no worker stalls.

The leader waits for proposals, the others wait for it; so they have twice its time. A peer may
still run the step before, whose rows take time.
"""

from __future__ import annotations

from workers.metrics.activity import ROW_LIMIT_S

LIMITS = 2.0
"""Detection limits within which a step of no rows must follow."""


class StepWatchdog:
    """Watches one attention rank. Pure: monotonic times are passed in."""

    def __init__(self, detection_limit_s: float) -> None:
        self._limit_s = LIMITS * detection_limit_s
        self._wanted_at: float | None = None

    def overdue_s(
        self, *, wants: bool, leads: bool, last_rows: int, last_commit: float, now: float
    ) -> float | None:
        """Time for which this rank has waited for a step, if it is too long.

        ``last_rows`` are those of the step before, of all ranks.
        """
        if not wants:
            self._wanted_at = None
            return None
        if self._wanted_at is None:
            self._wanted_at = now
        waited_s = now - max(self._wanted_at, last_commit)
        limit_s = (1.0 if leads else 2.0) * self._limit_s + last_rows * ROW_LIMIT_S
        return waited_s if waited_s > limit_s else None

    def begin(self) -> None:
        """A generation runs: nothing was wanted in it so far."""
        self._wanted_at = None
