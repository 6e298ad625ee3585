"""A Prometheus histogram as plain numbers, for a worker's flat table of stats. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Upper bounds for tokens of a step."""


class Histogram:
    """Counts by bucket. One thread observes, any thread may read."""

    def __init__(self, bounds: Sequence[int]) -> None:
        """``bounds`` are inclusive upper bounds, ascending; what is above has a bucket too."""
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0

    def observe(self, value: int) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def stats(self, name: str) -> dict[str, float]:
        """Cumulative counts, number and sum, named as in Prometheus' text format."""
        found: dict[str, float] = {}
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), tuple(self._counts), strict=True):
            total += count
            found[f'{name}_bucket{{le="{bound}"}}'] = float(total)
        return {**found, f"{name}_count": float(total), f"{name}_sum": float(self._sum)}
