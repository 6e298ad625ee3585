"""A Prometheus histogram as plain numbers, for a worker's flat table of stats. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Upper bounds for tokens of a step."""
TRANSFER_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Upper bounds for seconds of a transfer."""


class Histogram:
    """Counts by bucket. One thread observes, any thread may read."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """``bounds`` are inclusive upper bounds, ascending; what is above has a bucket too."""
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def stats(self, name: str, label: str = "") -> dict[str, float]:
        """Cumulative counts, number and sum, named as in Prometheus' text format.

        ``label`` is one more label of each, as ``name="value"``.
        """
        found: dict[str, float] = {}
        total = 0
        more, only = (f"{label},", f"{{{label}}}") if label else ("", "")
        for bound, count in zip((*self._bounds, "+Inf"), tuple(self._counts), strict=True):
            total += count
            found[f'{name}_bucket{{{more}le="{bound}"}}'] = float(total)
        return {**found, f"{name}_count{only}": float(total), f"{name}_sum{only}": float(self._sum)}
