"""Rows of the default tests, and rows that run in the long tier only."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from itertools import product
from typing import Any

import pytest


def quick_rows(quick: Container[Any], rows: Iterable[Any]) -> list[Any]:
    """`rows` for `pytest.mark.parametrize`; those that are not in `quick` are slow."""
    return [pytest.param(r, marks=() if r in quick else pytest.mark.slow) for r in rows]


def quick_values(*axes: Sequence[Any]) -> list[Any]:
    """All combinations of values, one from each axis; few of them are not slow.

    As many as the longest axis is long, so that each value of each axis is in one of them.
    """
    turns = range(max(map(len, axes)))
    sizes = [len(axis) for axis in axes]
    quick = {tuple((n + k * (n // size)) % size for k, size in enumerate(sizes)) for n in turns}
    return [
        pytest.param(
            *(axis[place] for axis, place in zip(axes, places, strict=True)),
            marks=() if places in quick else pytest.mark.slow,
        )
        for places in product(*map(range, sizes))
    ]
