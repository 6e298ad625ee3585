"""Cordoned places: no worker starts on a drained node before that node has left.

A host may return as another node under the same address before the controller has seen it leave. So
nodes are identified by their ids, not by their addresses alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.controller.parts.cluster import NodeIds
from cluster.core.codec import Message, from_plain, to_plain


class _Kept(Message, frozen=True, kw_only=True):
    node: str
    ids: frozenset[str]
    """Ids of the nodes at this address; empty until they are known."""


class Cordon:
    """Workers whose places wait until their node has left. Owned by ``Draining``."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}
        self._alive: NodeIds = {}

    def add(self, names: Sequence[str], node: str) -> None:
        """These workers of a node have left."""
        ids = self._alive.get(node, frozenset())
        self._kept |= dict.fromkeys(names, _Kept(node=node, ids=ids))

    def take_gone(self, alive: NodeIds) -> list[str]:
        """The workers whose nodes have left; they are removed from the list."""
        self._alive = alive
        gone = []
        for name, kept in list(self._kept.items()):
            there = alive.get(kept.node, frozenset())
            if not there or (kept.ids and not kept.ids & there):
                gone.append(name)
                del self._kept[name]
            elif not kept.ids:
                self._kept[name] = _Kept(node=kept.node, ids=there)
        return gone

    def memory(self) -> dict[str, Any]:
        """Plain data; ``restore`` takes it."""
        plain: dict[str, Any] = to_plain(self._kept)
        return plain

    def restore(self, memory: Mapping[str, Any]) -> None:
        """Continue the list of an earlier controller."""
        self._kept = {name: from_plain(kept, _Kept) for name, kept in memory.items()}
