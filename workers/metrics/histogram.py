"""A Prometheus histogram as plain numbers, for a worker's flat table of stats. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Upper bounds of buckets for the number of tokens of a step."""
TRANSFER_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Upper bounds of buckets for the seconds of a transfer."""


class Histogram:
    """Counts of values by bucket. One thread observes; any thread may read."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """``bounds``: inclusive upper bounds, ascending. Greater values have a bucket, too."""
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0
        self._names: dict[tuple[str, str], tuple[str, ...]] = {}

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def stats(self, name: str, label: str = "") -> dict[str, float]:
        """Cumulative counts, count and sum, named as in Prometheus' text format.

        ``label``: a further label in the form ``name="value"``.
        """
        names = self._names.get((name, label))
        if names is None:
            names = self._names[name, label] = self._series(name, label)
        totals = tuple(map(float, accumulate(self._counts)))
        return dict(zip(names, (*totals, totals[-1], self._sum), strict=True))

    def _series(self, name: str, label: str) -> tuple[str, ...]:
        """Names of the cumulative counts, the count and the sum."""
        more, only = (f"{label},", f"{{{label}}}") if label else ("", "")
        buckets = (f'{name}_bucket{{{more}le="{bound}"}}' for bound in (*self._bounds, "+Inf"))
        return (*buckets, f"{name}_count{only}", f"{name}_sum{only}")
