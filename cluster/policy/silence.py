"""Patience with silent workers, from earlier gaps between frames of the same host. Pure.

Accrual failure detectors compare a silence with earlier gaps in a bounded window
(Hayashibara et al., "The phi accrual failure detector", 2004), with a margin that follows how late
arrivals were (Chen, Toueg and Aguilera, "On the quality of service of failure detectors", 2002).
The largest gap stands for their distribution, which has a heavy tail on a busy machine; and it is
the machine that is busy, so the workers of a host share their gaps.
"""

from __future__ import annotations

import math

LATENESS_FACTOR = 4.0
"""Patience is the expected gap plus this factor times the largest recent lateness."""
MIN_GAPS = 4.0
"""Least patience in expected gaps: a machine may be busy for the first time."""
REMOTE_MIN_S = 1.0
"""Least patience over a network: TCP sends a lost segment again after 0.2 s, and after 0.4 s more
(RFC 6298, with the least timeout of Linux)."""
WINDOW_S = 15.0
"""Minimum time for which a gap counts; the maximum is twice as long."""


class GapWindow:
    """The largest recent gap, in constant memory. Times are monotonic seconds."""

    def __init__(self, expected_s: float = 0.1, is_remote: bool = False) -> None:
        self._expected_s = expected_s
        self._least_s = max(MIN_GAPS * expected_s, REMOTE_MIN_S if is_remote else 0.0)
        self._began_at = -math.inf
        self._largest = self._largest_before = math.inf

    def add(self, gap_s: float, now: float) -> None:
        """Record the gap between two frames of a worker; infinite if the gap is unknown."""
        if now - self._began_at >= WINDOW_S:
            self._began_at = now
            self._largest_before, self._largest = self._largest, 0.0
        self._largest = max(self._largest, gap_s)

    @property
    def patience_s(self) -> float:
        """Silence that the gaps explain; infinite for a window at least from the beginning."""
        late_s = max(self._largest, self._largest_before) - self._expected_s
        return max(self._least_s, self._expected_s + LATENESS_FACTOR * late_s)
