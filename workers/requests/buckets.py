"""Buckets: the row counts to which decode steps on a GPU are padded. Pure."""

from __future__ import annotations

from collections.abc import Sequence

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Sizes of which at most half is padding. A decode step mostly reads the weights, so padding rows
are nearly free, but each captured size takes some memory."""


def buckets_up_to(max_rows: int) -> tuple[int, ...]:
    """Buckets for steps of at most ``max_rows`` rows; the last one is no larger."""
    last = min(max_rows, BUCKETS[-1])
    return (*(size for size in BUCKETS if size < last), last)


def bucket_of(num_rows: int, buckets: Sequence[int]) -> int:
    """The smallest bucket with at least ``num_rows`` rows, or 0 if every bucket is smaller."""
    return next((size for size in buckets if size >= num_rows), 0)


def kept_rows(buckets: Sequence[int]) -> int:
    """Limit of the total rows of captured steps that are kept: two steps for each bucket."""
    return 2 * sum(buckets)
