"""Detects that a rank has rows to run but no step starts.

The last resort if no edge breaks and no worker stalls. The leader waits for proposals, and the
others wait for it, with twice its limit. A peer may still run the rows of the previous step.
"""

from __future__ import annotations

from workers.metrics.activity import ROW_LIMIT_S

LIMITS = 2.0
"""Number of detection limits within which a step without rows must follow."""


class StepWatchdog:
    """Watches one attention rank. Pure: monotonic times are passed in."""

    def __init__(self, detection_limit_s: float) -> None:
        self._limit_s = LIMITS * detection_limit_s
        self._wanted_at: float | None = None

    def overdue_s(
        self, *, wants: bool, leads: bool, last_rows: int, last_commit: float, now: float
    ) -> float | None:
        """Time for which this rank has waited for a step, or None if it is within the limit.

        ``last_rows`` are the rows of all ranks in the previous step.
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
        """Reset at the start of a generation, in which no rows were wanted yet."""
        self._wanted_at = None
