"""Blocks that leave one worker's pool for another's, and those that come in.

``KvExchange`` belongs to the engine's thread, like the pool. ``KvLending`` lets the threads of the
``KvServer`` have blocks of it: they ask, the engine's thread holds the blocks between two steps,
and what is held and has a hash does not change.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from workers.kv_blocks import BlockPool
from workers.kv_cache import KVCache
from workers.prefix_hash import BlockHash, block_hashes
from workers.request import Request
from workers.sequence import num_reusable


@dataclass(kw_only=True, slots=True, eq=False)
class Fetch:
    """Blocks on their way in. Its blocks are held, and nobody else knows of them."""

    hashes: tuple[BlockHash, ...]
    """Of the prefix, from the sequence's first block on."""
    found: list[int]
    """Blocks that are here, held meanwhile."""
    blocks: list[int]
    """Blocks to fill with what follows."""
    num_filled: int = 0
    """How many of them are, in order; written by the thread that fills them."""

    @property
    def wanted(self) -> tuple[BlockHash, ...]:
        """Hashes of ``blocks``."""
        return self.hashes[len(self.found) :]


class KvExchange:
    """See the module."""

    def __init__(
        self, pool: BlockPool, cache: KVCache, *, length_matters_above: int | None = None
    ) -> None:
        """``length_matters_above``: see ``ModelConfig``."""
        self.cache = cache
        """The blocks' data."""
        self._pool = pool
        self._length_matters_above = length_matters_above
        self._tables: list[list[int]] = []

    @property
    def tables(self) -> list[list[int]]:
        """Blocks that are held here, for ``check_integrity``."""
        return list(self._tables)

    def lend(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Hold the blocks of the longest known run from the first on."""
        blocks = self._pool.find(hashes)
        if blocks:
            self._pool.hold(blocks)
            self._tables.append(blocks)
        return blocks

    def end_loan(self, blocks: list[int], num_kept: int) -> None:
        """Let go of them; another worker has copies of the first ``num_kept`` now."""
        self._pool.lend(blocks[:num_kept])
        self._let_go(blocks)
        broken = [b for b in blocks if self._pool.hash_of(b) is None and self._pool.is_free(b)]
        self.cache.clear(broken)  # forgotten meanwhile: they may hold NaN

    def begin(self, request: Request, num_spare: int) -> Fetch | None:
        """Hold what is here of a prompt's prefix, and blocks for the rest of it.

        None where nothing is missing that could be used, or too few blocks are free: ``num_spare``
        free ones are left to others.
        """
        size = self.cache.block_size
        hashes = block_hashes(request, size, self._length_matters_above)
        del hashes[max(num_reusable(request), 0) // size :]
        found = self._pool.find(hashes)
        count = len(hashes) - len(found)
        num_kept = sum(self._pool.is_free(block) for block in found)
        if not count or not self._pool.can_allocate(count + num_kept + num_spare):
            return None
        self._pool.hold(found)
        fetch = Fetch(hashes=tuple(hashes), found=found, blocks=self._pool.allocate(count))
        self._tables += [fetch.found, fetch.blocks]
        return fetch

    def end(self, fetch: Fetch) -> None:
        """What was filled can be found from now on; the rest is blank."""
        parents = (None, *fetch.hashes)[len(fetch.found) :]
        filled = fetch.blocks[: fetch.num_filled]
        for block, name, parent in zip(filled, fetch.wanted, parents, strict=False):
            self._pool.store(block, name, parent)
        self._let_go(fetch.blocks)
        self._let_go(fetch.found)

    def _let_go(self, blocks: list[int]) -> None:
        place = next(i for i, table in enumerate(self._tables) if table is blocks)
        del self._tables[place]
        self._pool.release(blocks)


@dataclass(slots=True, eq=False)
class _Ask:
    """A question to the engine's thread."""

    hashes: Sequence[BlockHash]
    answered: threading.Event = field(default_factory=threading.Event)
    blocks: list[int] | None = None
    is_void: bool = False


class KvLending:
    """``Lender`` of an exchange. ``turn`` is for the engine's thread, the rest for others.

    Args:
        exchange: has the blocks.
        wake: called when the engine's thread should turn.
        timeout_s: longest wait for it: a step may be long.
    """

    def __init__(
        self, exchange: KvExchange, wake: Callable[[], None], timeout_s: float = 10.0
    ) -> None:
        self._exchange = exchange
        self._wake = wake
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._asked: deque[_Ask] = deque()
        self._returned: deque[tuple[list[int], int]] = deque()

    def borrow(self, hashes: Sequence[BlockHash]) -> list[int]:
        """See ``Lender``; nothing where the engine's thread does not come to it in time."""
        ask = _Ask(hashes)
        self._asked.append(ask)
        self._wake()
        if not ask.answered.wait(self._timeout_s):
            with self._lock:
                ask.is_void = True
        return ask.blocks or []

    def read(self, block: int) -> Tensor:
        """See ``Lender``."""
        return self._exchange.cache.read_block(block)

    def give_back(self, blocks: list[int], num_kept: int) -> None:
        """See ``Lender``."""
        if blocks:
            self._returned.append((blocks, num_kept))
            self._wake()

    def turn(self) -> None:
        """Answer who asked, and take back what was returned."""
        while self._returned:
            self._exchange.end_loan(*self._returned.popleft())
        while self._asked:
            ask = self._asked.popleft()
            with self._lock:
                if not ask.is_void:
                    ask.blocks = self._exchange.lend(ask.hashes)
            ask.answered.set()
