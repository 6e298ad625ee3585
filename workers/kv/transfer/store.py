"""Blocks that leave one worker's pool for another's, and blocks that come in.

``KvTransferStore`` belongs to the engine's thread, like the pool. ``KvLender`` serves the threads
of the KV server: they ask, and the engine's thread holds the blocks between two steps. A held block
that has a hash does not change. An item of the transfer (``workers.transport.peer_link``) is one
block: its part of each layer's cache, layer by layer. Its key is the hash, which covers tokens and
tenant: a worker that does not know it gets no block. The recurrent state behind a block is an item
of its own, [layers, values] in float32, by its ``state_key``: blocks are of use up to a state that
is known.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from workers.kv.block_pool import BlockPool
from workers.kv.cache import KVCache
from workers.kv.state_slots import StateSlots
from workers.requests.block_hash import BlockHash, state_key
from workers.requests.request import Request
from workers.requests.sequence import num_reusable


@dataclass(kw_only=True, slots=True, eq=False)
class Fetch:
    """Blocks on their way in. They are held, and cannot be found before the end."""

    hashes: tuple[BlockHash, ...]
    """Hashes of the prefix, from the first block of the sequence on."""
    found: list[int]
    """Blocks that are here already, held meanwhile."""
    blocks: list[int]
    """Blocks to fill with the rest of the prefix."""
    num_filled: int = 0
    """How many of ``blocks`` are filled, in order; written by the thread that fills them."""
    state: int | None = None
    """Slot to fill with a recurrent state; None: the model has none."""
    num_before_state: int = 0
    """Blocks of the prefix up to the state that is filled in, 0 for none; written by this thread
    too."""

    @property
    def wanted(self) -> tuple[BlockHash, ...]:
        return self.hashes[len(self.found) :]

    @property
    def states(self) -> Iterator[int]:
        """Blocks of the prefix behind which a state would help: whose end is, or is about to be,
        computed by a worker that goes on with it."""
        num_filled = len(self.found) + self.num_filled
        counts = dict.fromkeys((len(self.hashes), len(self.hashes) - 1, num_filled, num_filled - 1))
        return (count for count in counts if count > 0)


@dataclass(slots=True)
class KvTransferStore:
    """See the module."""

    pool: BlockPool
    cache: KVCache
    states: StateSlots | None = None
    """Of a model with recurrent states."""
    tables: list[list[int]] = field(default_factory=list)
    """Blocks that are held here."""

    def lend(self, keys: Sequence[bytes]) -> list[int]:
        """Hold the blocks of the longest known run from the first key on, or one state: -1 - slot.

        A state is asked for alone.
        """
        blocks = self.pool.find(keys)
        if not blocks and len(keys) == 1 and self.states is not None:
            slot = self.states.hold_extra(state_key(keys[0]))
            if slot is not None:
                self.cache.side.follow()
                return [-1 - slot]
        if blocks:
            self.pool.hold(blocks)
            self.tables.append(blocks)
            self.cache.side.follow()
        return blocks

    def end_loan(self, blocks: list[int], num_kept: int) -> None:
        """Release what was lent; another worker has copies of the first ``num_kept`` now."""
        if blocks[0] < 0:
            assert self.states is not None, "a state was lent"
            if num_kept:
                self.states.lend(-1 - blocks[0])
            self.states.release_extra(-1 - blocks[0])
            return
        self.pool.lend(blocks[:num_kept])
        self._release(blocks)
        broken = [b for b in blocks if self.pool.hash_of(b) is None and self.pool.is_free(b)]
        self.cache.clear(broken)  # forgotten while on loan: they may hold NaN

    def usable(self, request: Request, hashes: Sequence[BlockHash]) -> Sequence[BlockHash]:
        """Those of the hashes of a prompt's full blocks that it need not compute."""
        return hashes[: max(num_reusable(request), 0) // self.cache.block_size]

    def begin(
        self, hashes: Sequence[BlockHash], found: Sequence[int], num_spare: int
    ) -> Fetch | None:
        """Hold the blocks of a prefix that are ``found`` here, and blocks for the rest.

        None where no block is missing, or fewer blocks are free than the fetch needs with
        ``num_spare`` left to other requests, or no slot for a state.
        """
        count = len(hashes) - len(found)
        num_kept = sum(self.pool.is_free(block) for block in found)
        if not count or not self.pool.can_allocate(count + num_kept + num_spare):
            return None
        state = None if self.states is None else self.states.allocate_extra()
        if state is None and self.states is not None:
            return None
        self.pool.hold(found)
        blocks = self.pool.allocate(count)
        fetch = Fetch(hashes=tuple(hashes), found=list(found), blocks=blocks, state=state)
        self.tables += [fetch.found, fetch.blocks]
        self.cache.side.follow()
        return fetch

    def end(self, fetch: Fetch) -> None:
        """Publish the filled blocks under their hashes, and release all."""
        parents = (None, *fetch.hashes)[len(fetch.found) :]
        filled = fetch.blocks[: fetch.num_filled]
        for block, name, parent in zip(filled, fetch.wanted, parents, strict=False):
            self.pool.store(block, name, parent)
        if fetch.state is not None and self.states is not None:
            if fetch.num_before_state:
                self.states.store(fetch.state, fetch.hashes[fetch.num_before_state - 1])
            self.states.release_extra(fetch.state)
        self._release(fetch.blocks)
        self._release(fetch.found)

    def _release(self, blocks: list[int]) -> None:
        place = next(i for i, table in enumerate(self.tables) if table is blocks)
        del self.tables[place]
        self.pool.release(blocks)


@dataclass(slots=True)
class KvLender:
    """``Lender`` of a store. ``answer`` belongs to the engine's thread, the rest to others."""

    store: KvTransferStore
    wake: Callable[[], None]
    """Called when the engine's thread should answer."""
    timeout_s: float = 10.0
    """Longest wait for the engine's thread: a step may be long."""
    _asked: deque[tuple[Sequence[BlockHash], Future[list[int]]]] = field(default_factory=deque)
    _returned: deque[tuple[list[int], int]] = field(default_factory=deque)

    def borrow(self, keys: Sequence[BlockHash]) -> list[int]:
        """See ``Lender``; nothing where the engine's thread does not answer in time."""
        blocks: Future[list[int]] = Future()
        self._asked.append((keys, blocks))
        self.wake()
        try:
            return blocks.result(self.timeout_s)
        except TimeoutError:
            return [] if blocks.cancel() else blocks.result()

    def read(self, item: int) -> tuple[Tensor]:
        cache = self.store.cache
        return (cache.read_block(item) if item >= 0 else cache.read_state(-1 - item),)

    def give_back(self, items: list[int], num_kept: int) -> None:
        if items:
            self._returned.append((items, num_kept))
            self.wake()

    def answer(self) -> None:
        """Take back what was returned, and lend what was asked for."""
        while self._returned:
            self.store.end_loan(*self._returned.popleft())
        while self._asked:
            keys, blocks = self._asked.popleft()
            if blocks.set_running_or_notify_cancel():
                blocks.set_result(self.store.lend(keys))
