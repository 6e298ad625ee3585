"""The tree in which proposals go up to the leader and step headers come down from it. Pure.

    attention-0                   leader
    ├─ attention-1                sends headers on to its children, and their proposals up
    │  ├─ attention-4
    │  └─ expert-0
    ├─ attention-2  ..

With a message to each of n workers, the leader's time for a step would grow with n. In the tree it
grows with the square root: of 127 other workers, 8 attention ranks are below the leader, and each
of them has up to 15 workers below it. In a small cluster all workers are children of the leader.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from cluster.core.topology import Generation, Member

MAX_DIRECT = 8
"""Maximum number of other workers that are all children of the leader."""
_WIDTH = 0.7
"""Children of the leader, as a multiple of the square root of all other workers. The time until the
last worker has a header is least with 1, but the leader has more to do than others."""


@dataclass(frozen=True, slots=True)
class StepTree:
    """The place of one worker in the tree of a generation."""

    leader: str
    """Name of the worker with the lowest attention rank, at the root."""
    parent: str
    """Name of the worker from which headers come; empty on the leader."""
    children: tuple[str, ...]
    """Names of the workers to which this worker sends the headers."""
    inner: frozenset[str]
    """Names of the children that have children."""
    ranks_below: Mapping[str, frozenset[int]]
    """For each child that runs attention, its attention rank and those of its children."""

    @property
    def depth(self) -> int:
        """Number of messages by which a header comes from the leader: 0 on the leader, 1 or 2."""
        return 0 if not self.parent else 1 if self.parent == self.leader else 2

    @classmethod
    def of(cls, generation: Generation, name: str, group: int | None = None) -> Self:
        """Return the place of the worker ``name`` in the tree of a step group, by default its own.

        ``group``: index in ``Generation.groups``; expert workers have a place in each tree. Only
        attention ranks have children, as expert workers share no connections.
        """
        group = generation.group_of(name) if group is None else group
        if group >= len(generation.groups):
            return cls("", "", (), frozenset(), {})
        attention = generation.groups[group]
        children = _children(attention, generation.experts)
        parents = {child.name: parent for parent, own in children.items() for child in own}
        below = {
            child.name: frozenset(
                m.rank for m in (child, *children.get(child.name, ())) if m.runs_attention
            )
            for child in children.get(name, ())
            if child.runs_attention
        }
        own = tuple(child.name for child in children.get(name, ()))
        inner = frozenset(own) & children.keys()
        return cls(attention[0].name, parents.get(name, ""), own, inner, below)


def _children(attention: Sequence[Member], experts: Sequence[Member]) -> dict[str, list[Member]]:
    """Return the children of each worker that has any."""
    leader, *others = attention
    others += [m for m in experts if not m.runs_attention]
    if len(others) <= MAX_DIRECT:
        return {leader.name: others}
    width = math.ceil(_WIDTH * math.sqrt(len(others)))
    inner = others[: min(width, len(attention) - 1)]
    parents = inner if len(inner) == width else [leader, *inner]
    found: dict[str, list[Member]] = {leader.name: list(inner)}
    for number, member in enumerate(others[len(inner) :]):
        found.setdefault(parents[number % len(parents)].name, []).append(member)
    return found
