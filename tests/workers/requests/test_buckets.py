"""The numbers of rows of captured steps."""

from __future__ import annotations

import pytest

from workers.requests.buckets import BUCKETS, bucket_of, buckets_up_to


@pytest.mark.parametrize(
    ("most", "buckets"), [(1, (1,)), (8, (1, 2, 4, 8)), (10, (1, 2, 4, 8, 10)), (600, BUCKETS)]
)
def test_the_last_bucket_holds_the_largest_step(most: int, buckets: tuple[int, ...]) -> None:
    assert buckets_up_to(most) == buckets


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (3, 4), (4, 4), (5, 8), (9, 0)])
def test_rows_are_filled_up_to_the_next_bucket(rows: int, bucket: int) -> None:
    assert bucket_of(rows, (1, 2, 4, 8)) == bucket
