"""Which cached blocks build on which. Pure."""

from __future__ import annotations

from collections.abc import Collection, KeysView


class PrefixTree:
    """Knows the cached blocks by name, and of each one the blocks that continue its prefix."""

    def __init__(self) -> None:
        self._parents: dict[bytes, bytes | None] = {}
        self._children: dict[bytes, set[bytes]] = {}

    @property
    def names(self) -> KeysView[bytes]:
        """All blocks."""
        return self._parents.keys()

    def __contains__(self, name: bytes) -> bool:
        return name in self._parents

    def children(self, name: bytes) -> Collection[bytes]:
        """Blocks that build on this one directly."""
        return self._children.get(name, ())

    def add(self, name: bytes, parent: bytes | None) -> None:
        """A block has contents now, which build on ``parent``."""
        self._parents[name] = parent
        if parent is not None:
            self._children.setdefault(parent, set()).add(name)

    def remove(self, name: bytes) -> None:
        """A block's contents are gone; those that build on it stay."""
        parent = self._parents.pop(name)
        if parent is not None:
            self._children[parent].discard(name)
            if not self._children[parent]:
                del self._children[parent]

    def check_integrity(self) -> None:
        """Assert that children and parents agree."""
        children: dict[bytes, set[bytes]] = {}
        for name, parent in self._parents.items():
            if parent is not None:
                children.setdefault(parent, set()).add(name)
        assert children == self._children, "blocks that build on others are miscounted"
