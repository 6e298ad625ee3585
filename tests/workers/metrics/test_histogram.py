"""Counts by bucket."""

from __future__ import annotations

from workers.metrics.histogram import Histogram


def test_counts_are_cumulative_and_bounds_inclusive() -> None:
    histogram = Histogram((1, 8))
    for value in (1, 2, 8, 9, 100):
        histogram.observe(value)
    assert histogram.stats("x") == {
        'x_bucket{le="1"}': 1,
        'x_bucket{le="8"}': 3,
        'x_bucket{le="+Inf"}': 5,
        "x_count": 5,
        "x_sum": 120,
    }
