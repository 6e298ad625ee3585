"""Places of nodes that were drained to be taken down: nobody is started there until they have gone.

A host may be back, as another node under the same address, before anybody has seen it gone. So the
nodes are known by their ids, not by their addresses alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NodeIds = Mapping[str, frozenset[str]]
"""Address of a host, as members name it -> ids of the living nodes there: of more than one while
the end of an earlier one has not been noticed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kept:
    node: str
    """Address."""
    ids: frozenset[str]
    """Of the nodes that were there; empty while nobody has looked."""


class KeptEmpty:
    """Workers whose places wait for their node to go. Owned by ``Draining``."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}
        self._alive: NodeIds = {}

    def add(self, names: Sequence[str], node: str) -> None:
        """These workers of a node have left."""
        ids = self._alive.get(node, frozenset())
        self._kept |= dict.fromkeys(names, _Kept(node=node, ids=ids))

    def take_gone(self, alive: NodeIds) -> list[str]:
        """The workers whose nodes are not there any more; they are not kept on."""
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
        return {name: {"node": k.node, "ids": sorted(k.ids)} for name, k in self._kept.items()}

    def restore(self, memory: Mapping[str, Any]) -> None:
        """What an earlier controller knew."""
        self._kept = {
            name: _Kept(node=known["node"], ids=frozenset(known["ids"]))
            for name, known in memory.items()
        }
