"""Reference counts and hashes of KV blocks. Pure; the tensors are in ``workers.kv.cache``.

A full block can be found by its hash, which covers its tokens and all tokens before them. A free
block keeps its hash, and so can be reused, until it is allocated again. Blocks without a hash are
allocated first, then blocks in the order of ``workers.kv.eviction``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from workers.kv.eviction import EvictionOrder
from workers.kv.turns import NO_HINTS, KeepHints, Turn
from workers.requests.block_hash import BlockHash


@dataclass(frozen=True, kw_only=True, slots=True)
class HashChanges:
    """Hashes that were stored and removed since the last call of ``take_changes``."""

    stored: tuple[BlockHash, ...]
    """New hashes, oldest first."""
    removed: tuple[BlockHash, ...]
    """Removed hashes, oldest first."""


class BlockPool:
    """Reference-counted blocks 0 .. num_blocks - 1. A block without a holder is free."""

    def __init__(self, num_blocks: int, max_kept: int = 0) -> None:
        """``max_kept``: limit of free blocks that requests may keep longer than others."""
        self.num_blocks = num_blocks
        self._holders = [0] * num_blocks
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._by_hash: dict[BlockHash, int] = {}
        self._blank: deque[int] = deque(range(num_blocks))  # free, without a hash
        self._num_known = 0  # free, with a hash
        self._order = EvictionOrder(max_kept=max_kept)
        self._stored: dict[BlockHash, None] = {}
        self._removed: dict[BlockHash, None] = {}

    @property
    def num_free(self) -> int:
        """Number of blocks without a holder, with or without a hash."""
        return len(self._blank) + self._num_known

    @property
    def num_kept(self) -> int:
        """Number of free blocks that a request asked to keep longer than others."""
        return self._order.num_kept

    def advance(self, now_s: float) -> None:
        """Set the monotonic time. Blocks with an expired keep time become ordinary free blocks."""
        self._order.advance(now_s)

    def can_allocate(self, count: int) -> bool:
        return count <= self.num_free

    def is_free(self, block: int) -> bool:
        return self._holders[block] == 0

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` free blocks for one holder and remove their hashes."""
        assert self.can_allocate(count), f"{count} blocks of {self.num_free} free ones"
        blocks = [self._take_free() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add a holder to blocks that have one already, or that ``find`` just returned."""
        for block in blocks:
            self._hold(block)
            if (block_hash := self._hashes[block]) is not None:
                self._order.find(block_hash)

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a holder to cached blocks while they are copied; unlike ``share``, it is no reuse."""
        for block in blocks:
            self._hold(block)

    def mark_duplicated(self, blocks: Iterable[int]) -> None:
        """Mark blocks of a prefix as copied by another worker, so that they are evicted first."""
        hashes = [self._hashes[block] for block in blocks]
        self._order.mark_duplicated([block_hash for block_hash in hashes if block_hash is not None])

    def begin(self, hashes: Sequence[BlockHash], hints: KeepHints = NO_HINTS) -> Turn:
        """Begin and return a request's turn. ``hashes``: those of its prompt's full blocks."""
        return self._order.begin(hashes, hints)

    def release(self, blocks: Sequence[int], turn: Turn | None = None) -> None:
        """Drop one holder of each block of a table; blocks without holders become free.

        The last block of the table becomes free first, since it is useless without the blocks
        before it. ``turn``: the result of ``begin`` if a request ends.
        """
        for block in reversed(blocks):
            assert self._holders[block] > 0, f"block {block} is free already"
            self._holders[block] -= 1
            block_hash = self._hashes[block]
            if self._holders[block]:
                if turn is not None and block_hash is not None:
                    self._order.leave(block_hash, turn)
                continue
            if block_hash is None:
                self._blank.append(block)
            else:
                self._num_known += 1
                self._order.release(block_hash, turn)
        if turn is not None:
            self._order.end(turn)

    # Contents of blocks

    def find(self, hashes: Iterable[BlockHash]) -> list[int]:
        """Return the blocks of the longest known prefix of ``hashes``. Changes nothing."""
        found: list[int] = []
        for block_hash in hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def is_known(self, block_hash: BlockHash) -> bool:
        """Whether a block can be found by this hash."""
        return block_hash in self._by_hash

    def hash_of(self, block: int) -> BlockHash | None:
        """Return the hash by which a block can be found; None if it has none."""
        return self._hashes[block]

    def was_found(self, block: int) -> bool:
        """Whether ``share`` was called for a block after its hash was stored."""
        block_hash = self._hashes[block]
        return block_hash is not None and self._order.was_found(block_hash)

    def store(self, block: int, block_hash: BlockHash, parent: BlockHash | None = None) -> None:
        """Make a held block with final contents findable by its hash.

        ``parent``: the hash of the block before it, if any. If another block has the same
        contents, ``find`` continues to return the other block.
        """
        assert self._holders[block], f"block {block} is free"
        assert self._hashes[block] in (None, block_hash), f"block {block} changed its contents"
        if block_hash in self._by_hash:
            return
        self._by_hash[block_hash] = block
        self._hashes[block] = block_hash
        self._order.learn(block_hash, parent)
        if block_hash in self._removed:
            del self._removed[block_hash]
        else:
            self._stored[block_hash] = None

    def forget(self, blocks: Iterable[int]) -> None:
        """Remove the hashes of these blocks, so that their contents cannot be found."""
        for block in blocks:
            if self._hashes[block] is None:
                continue
            self._drop_hash(block)
            if not self._holders[block]:
                self._num_known -= 1
                self._blank.append(block)

    def take_changes(self) -> HashChanges:
        """Return hashes stored and removed since the last call, except those that were both.

        Gateways learn from them which worker caches which prefix. The size of the pool bounds them.
        """
        changes = HashChanges(stored=tuple(self._stored), removed=tuple(self._removed))
        self._stored.clear()
        self._removed.clear()
        return changes

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that the holders are exactly ``tables``, that all other blocks are free, and that
        each hash maps to the block that has it."""
        found = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), "a block table names a block twice"
            for block in table:
                found[block] += 1
        assert found == self._holders, "the holders differ from the block tables"
        by_hash = {h: block for block, h in enumerate(self._hashes) if h is not None}
        assert by_hash == self._by_hash, "hashes and blocks differ"
        known = [by_hash[block_hash] for block_hash in self._order.free]
        free = sorted((*self._blank, *known))
        assert free == [b for b in range(self.num_blocks) if not found[b]], "free list is wrong"
        assert all(self._hashes[b] is None for b in self._blank), "a blank block has a hash"
        assert len(known) == self._num_known, "free blocks with a hash are miscounted"
        self._order.check_integrity([h for h, block in by_hash.items() if found[block]])
        assert self._stored.keys() <= by_hash.keys(), "a stored hash is missing"
        assert self._removed.keys().isdisjoint(by_hash), "a removed hash is present"

    def _take_free(self) -> int:
        if self._blank:
            return self._blank.popleft()
        block = self._by_hash[self._order.pop()]
        self._num_known -= 1
        self._drop_hash(block)
        return block

    def _hold(self, block: int) -> None:
        if not self._holders[block]:
            block_hash = self._hashes[block]
            assert block_hash is not None, f"block {block} is free"
            self._num_known -= 1
            self._order.hold(block_hash)
        self._holders[block] += 1

    def _drop_hash(self, block: int) -> None:
        block_hash = self._hashes[block]
        assert block_hash is not None, f"block {block} has no hash"
        self._hashes[block] = None
        self._order.forget(block_hash)
        del self._by_hash[block_hash]
        if block_hash in self._stored:
            del self._stored[block_hash]
        else:
            self._removed[block_hash] = None
