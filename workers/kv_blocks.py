"""Accounting of KV blocks. Pure; the tensors are in ``kv_cache``."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence


class BlockPool:
    """Reference-counted blocks 0 .. num_blocks - 1. A block is free when nobody holds it."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._free: deque[int] = deque(range(num_blocks))
        self._holders = [0] * num_blocks

    @property
    def num_blocks(self) -> int:
        """All blocks."""
        return self._num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def can_allocate(self, count: int) -> bool:
        """Whether ``allocate(count)`` would succeed."""
        return count <= len(self._free)

    def is_free(self, block: int) -> bool:
        """Whether nobody holds a block."""
        return self._holders[block] == 0

    def allocate(self, count: int) -> list[int]:
        """Take free blocks for one holder."""
        assert self.can_allocate(count), f"{count} blocks of {len(self._free)} free ones"
        blocks = [self._free.popleft() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add a holder to blocks that somebody holds."""
        for block in blocks:
            assert self._holders[block] > 0, f"block {block} is free"
            self._holders[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one holder of each block; blocks without holders become free."""
        for block in blocks:
            assert self._holders[block] > 0, f"block {block} is free already"
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free.append(block)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that the holders are exactly the given block tables, and the rest is free."""
        found = [0] * self._num_blocks
        for table in tables:
            assert len(set(table)) == len(table), "a block table names a block twice"
            for block in table:
                found[block] += 1
        assert found == self._holders, "the holders differ from the block tables"
        free = sorted(self._free)
        assert free == [b for b in range(self._num_blocks) if not found[b]], "free list is wrong"
