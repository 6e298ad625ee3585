"""How long a worker may be silent, by the gaps between the signs of life on its host. Pure.

    expected gap                 0.1 s
    largest gap of late          0.13 s: 0.03 s late
    patience    0.1 s + 4 times 0.03 s = 0.22 s, raised to 3 expected gaps = 0.3 s

Source: accrual failure detectors judge a silence by the gaps that were seen, in a bounded window
(Hayashibara et al., "The phi accrual failure detector", 2004), and a margin on the expected arrival
follows how late arrivals were (Chen, Toueg and Aguilera, "On the quality of service of failure
detectors", 2002). They fit a distribution: a normal one needs seconds on top (Akka), an exponential
one 18 mean gaps (Cassandra). Gaps on a busy machine have a heavy tail, for which the largest one
stands here; and it is the machine that is busy, so the workers of a host share their gaps.
"""

from __future__ import annotations

import math

LATENESS_FACTOR = 4.0
"""A gap may be late by so many times the largest lateness of late."""
MIN_GAPS = 3.0
"""Patience in expected gaps at least: a machine may be busy for the first time."""
MIN_COUNT = 100
"""Gaps from which on they tell something."""
WINDOW_S = 15.0
"""Time for which a gap counts at least; twice that at most."""


class GapWindow:
    """The largest of the gaps of late, in constant memory. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._began_at = -math.inf
        self._largest = 0.0
        self._largest_before = 0.0
        self._count = 0

    def add(self, gap_s: float, now: float) -> None:
        """A gap between two signs of life has ended."""
        if now - self._began_at >= WINDOW_S:
            self._began_at = now
            self._largest_before, self._largest = self._largest, 0.0
        self._count += 1
        self._largest = max(self._largest, gap_s)

    @property
    def largest_s(self) -> float:
        """Infinite while too few were seen."""
        return max(self._largest, self._largest_before) if self._count >= MIN_COUNT else math.inf


def patience_s(largest_s: float, expected_s: float, limit_s: float) -> float:
    """Silence after which a worker with these gaps is lost: ``limit_s`` at the most."""
    late_s = max(0.0, largest_s - expected_s)
    wanted_s = max(MIN_GAPS * expected_s, expected_s + LATENESS_FACTOR * late_s)
    return min(limit_s, wanted_s)
