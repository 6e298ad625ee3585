"""Patience: how long a worker may be silent, from recent gaps of workers on its host. Pure.

Accrual failure detectors compare a silence with the observed gaps in a bounded window (Hayashibara
et al., "The phi accrual failure detector", 2004), with a margin that follows the lateness of
arrivals (Chen, Toueg and Aguilera, "On the quality of service of failure detectors", 2002). The
largest gap replaces the distribution, which has a heavy tail on a busy machine. The workers of a
host share their gaps, because a busy machine delays all of them.
"""

from __future__ import annotations

import math

LATENESS_FACTOR = 4.0
"""Patience beyond the expected gap, as a multiple of the largest recent lateness."""
MIN_GAPS = 4.0
"""Smallest patience, in multiples of the expected gap: a machine may become busy at any time."""
REMOTE_MIN_S = 1.0
"""Smallest patience over a network, in seconds: TCP retransmits a lost segment after 0.2 s, and
again 0.4 s later (RFC 6298, with the smallest timeout of Linux)."""
WINDOW_S = 15.0
"""A gap counts for at least this number of seconds, and for at most twice as many."""


class GapWindow:
    """Tracks the largest recent gap between two frames of the same worker of a host.

    The memory is constant. Times are monotonic seconds.
    """

    def __init__(self, expected_s: float = 0.1, is_remote: bool = False) -> None:
        self._expected_s = expected_s
        self._least_s = max(MIN_GAPS * expected_s, REMOTE_MIN_S if is_remote else 0.0)
        self._began_at = -math.inf
        self._largest = self._largest_before = math.inf

    def add(self, gap_s: float, now: float) -> None:
        """Add a gap between two frames of a worker; infinity stands for an unknown gap."""
        if now - self._began_at >= WINDOW_S:
            self._began_at = now
            self._largest_before, self._largest = self._largest, 0.0
        self._largest = max(self._largest, gap_s)

    @property
    def patience_s(self) -> float:
        """Longest silence, in seconds, that the recent gaps explain.

        Infinite until a whole window (``WINDOW_S``) has passed, or if a recent gap is unknown.
        """
        late_s = max(self._largest, self._largest_before) - self._expected_s
        return max(self._least_s, self._expected_s + LATENESS_FACTOR * late_s)
