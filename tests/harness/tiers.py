"""Rows of the default tests, and rows that run in the long tier only."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def quick_rows(quick: Container[Any], rows: Iterable[Any]) -> list[Any]:
    """`rows` for `pytest.mark.parametrize`; those that are not in `quick` are slow."""
    return [pytest.param(r, marks=() if r in quick else pytest.mark.slow) for r in rows]
