"""Buckets: the row counts to which decode steps on a GPU are padded. Pure."""

from __future__ import annotations

from collections.abc import Sequence

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Numbers of rows to which decode steps are padded. At most half of a padded step is padding. A
decode step mostly reads the weights, so padding rows are nearly free, but each captured size takes
some memory."""


def buckets_up_to(max_rows: int) -> tuple[int, ...]:
    """Return the buckets (padded numbers of rows) for steps of up to ``max_rows`` rows, ascending.

    The last bucket is ``max_rows``, or the largest of ``BUCKETS`` if this is less.
    """
    last = min(max_rows, BUCKETS[-1])
    return (*(size for size in BUCKETS if size < last), last)


def bucket_of(num_rows: int, buckets: Sequence[int]) -> int:
    """Return the smallest bucket with at least ``num_rows`` rows; 0 if every bucket is smaller.

    ``buckets`` must be ascending.
    """
    return next((size for size in buckets if size >= num_rows), 0)


def kept_rows(buckets: Sequence[int]) -> int:
    """Return the maximum total rows of captured steps to keep: two steps for each bucket."""
    return 2 * sum(buckets)
