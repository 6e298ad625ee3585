"""Tree of the cached blocks by prefix. Pure."""

from __future__ import annotations

from collections.abc import Collection, KeysView


class PrefixTree:
    """Cached blocks by name, each with its parent and the blocks that continue its prefix."""

    def __init__(self) -> None:
        self._parents: dict[bytes, bytes | None] = {}
        self._children: dict[bytes, set[bytes]] = {}

    @property
    def names(self) -> KeysView[bytes]:
        return self._parents.keys()

    def __contains__(self, name: bytes) -> bool:
        return name in self._parents

    def children(self, name: bytes) -> Collection[bytes]:
        """Return the blocks that build on this one directly."""
        return self._children.get(name, ())

    def add(self, name: bytes, parent: bytes | None) -> None:
        """Add a block with contents that build on ``parent``."""
        self._parents[name] = parent
        if parent is not None:
            self._children.setdefault(parent, set()).add(name)

    def remove(self, name: bytes) -> None:
        """Remove a block. The blocks that build on it stay."""
        parent = self._parents.pop(name)
        if parent is not None:
            self._children[parent].discard(name)
            if not self._children[parent]:
                del self._children[parent]

    def check_integrity(self) -> None:

        children: dict[bytes, set[bytes]] = {}
        for name, parent in self._parents.items():
            if parent is not None:
                children.setdefault(parent, set()).add(name)
        assert children == self._children, "blocks that build on others are miscounted"
