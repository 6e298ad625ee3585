"""Makes members from names or from pool sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.core.codec import from_plain
from cluster.core.topology import Member, Role, holds_experts


def member_of(name: str, **more: Any) -> Member:
    """Return the member of a name: ``expert-1`` and ``expert-1.2`` are expert workers of rank 1."""
    role, _, number = name.rpartition("-")
    values = {"name": name, "role": role, "rank": int(number.split(".")[0])}
    return from_plain(values | more, Member)


def members_of(pools: Mapping[Role, int]) -> tuple[Member, ...]:
    """Return members as the worker group ranks them, before they have registered."""
    return tuple(
        Member(name=f"{role}-{i}", role=role, rank=i, device=i if holds_experts(role) else -1)
        for role, number in pools.items()
        for i in range(number)
    )
