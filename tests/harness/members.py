"""Members by their names alone."""

from __future__ import annotations

from typing import Any

from cluster.core.codec import from_plain
from cluster.core.topology import Member


def member_of(name: str, **more: Any) -> Member:
    """``expert-1`` and ``expert-1.2`` are expert workers of rank 1."""
    role, _, number = name.rpartition("-")
    values = {"name": name, "role": role, "rank": int(number.split(".")[0])}
    return from_plain(values | more, Member)
