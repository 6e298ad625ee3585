"""Numbers of rows of decode steps on a GPU: those between are filled up to the next. Pure."""

from __future__ import annotations

from collections.abc import Sequence

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""At most half of the rows are padding. Reading the weights is the cost of a decode step, so
padding is nearly free, and each size takes some memory for what is captured."""


def buckets_up_to(max_rows: int) -> tuple[int, ...]:
    """The buckets of steps of at most so many rows; the last one is no larger."""
    last = min(max_rows, BUCKETS[-1])
    return (*(size for size in BUCKETS if size < last), last)


def bucket_of(num_rows: int, buckets: Sequence[int]) -> int:
    """The smallest that holds so many rows; 0: none does."""
    return next((size for size in buckets if size >= num_rows), 0)


def kept_rows(buckets: Sequence[int]) -> int:
    """Rows of all captured steps that are kept: two of each bucket."""
    return 2 * sum(buckets)
