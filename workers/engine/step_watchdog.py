"""Detects that a rank has rows to run but no step starts.

The watchdog is the last resort for failures in which no connection breaks and no worker stalls. The
leader waits for proposals. The other ranks wait for the worker that sends them headers, with twice
the leader's limit, or three times if this is not the leader: the worker nearest to the failure
finds it first. The limits are longer after a step with rows, as a peer may still run them.
"""

from __future__ import annotations

from workers.metrics.activity import ROW_LIMIT_S

LIMITS = 2.0
"""Longest wait of the leader for a step, as a multiple of the detection limit, if the previous step
had no rows."""


class StepWatchdog:
    """Detects that one attention rank waits too long for a step. Pure: times are passed in."""

    def __init__(self, detection_limit_s: float) -> None:
        self._limit_s = LIMITS * detection_limit_s
        self._wanted_at: float | None = None

    def overdue_s(
        self, *, wants: bool, depth: int, last_rows: int, last_commit: float, now: float
    ) -> float | None:
        """Return the seconds for which this rank has waited for a step; None within the limit.

        ``wants``: this rank, or one below it in the tree, has rows to run. ``depth``: see
        ``StepTree``. ``last_rows``: rows of all ranks in the previous step. ``last_commit`` and
        ``now``: monotonic times.
        """
        if not wants:
            self._wanted_at = None
            return None
        if self._wanted_at is None:
            self._wanted_at = now
        waited_s = now - max(self._wanted_at, last_commit)
        limit_s = (1 + depth) * self._limit_s + last_rows * ROW_LIMIT_S
        return waited_s if waited_s > limit_s else None

    def begin(self) -> None:
        """Begin a generation: reset the time for which this rank has waited."""
        self._wanted_at = None
