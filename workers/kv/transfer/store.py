"""Blocks that leave one worker's pool for another's, and blocks that come in.

``KvTransferStore`` belongs to the engine's thread, like the pool. A held block that has a hash does
not change. An item of the transfer (``workers.transport.peer_link``) is one block: its part of each
layer's cache, layer by layer. Its key is the hash, which covers tokens and tenant: a worker that
does not know it gets no block.

Blocks of a model with recurrent states are of use up to a state that is known. A worker asks for a
state first, by the ``state_key`` of each block behind which one would help, and gets the last of
these states that the peer has: one item, whose data is the place of its key, int64, and the state,
[layers, values] in float32. Then it asks for the blocks up to that state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from workers.kv.block_pool import BlockPool
from workers.kv.cache import KVCache
from workers.kv.contents import BlockContents
from workers.kv.state_slots import StateSlots
from workers.kv.turns import Turn
from workers.requests.block_hash import BlockHash, state_key
from workers.requests.request import Request
from workers.requests.sequence import num_reusable


@dataclass(kw_only=True, slots=True, eq=False)
class StateFetch:
    """A recurrent state on its way in."""

    slot: int
    """Slot to fill, held meanwhile."""
    num_known: int
    """Blocks of the prefix up to the last one whose state was here at the beginning; 0: none was.
    A state that helps is behind a later one."""
    num_before: int = 0
    """Blocks of the prefix up to the state that came, 0: none has come; written by the thread that
    fills the slot."""


@dataclass(kw_only=True, slots=True, eq=False)
class Fetch:
    """Blocks on their way in. They are held, and cannot be found before the end."""

    hashes: tuple[BlockHash, ...]
    """Hashes of the prefix, from the first block of the sequence on."""
    found: list[int]
    """Blocks that are here already, held meanwhile."""
    num_usable: int
    """Blocks of ``found`` that were of use at the beginning: all, or those up to a known state."""
    blocks: list[int]
    """Blocks for the rest of the prefix."""
    num_filled: int = 0
    """How many of ``blocks`` are filled, in order; written by the thread that fills them."""
    state: StateFetch | None = None
    """None: the model has no states, or that behind the whole prefix is here."""

    def lacks(self, block_hash: BlockHash) -> bool:
        """Whether a block of the prefix was of no use at the beginning."""
        return block_hash in self.hashes[self.num_usable :]

    @property
    def missing(self) -> tuple[BlockHash, ...]:
        """Blocks of the prefix that were not here at the beginning."""
        return self.hashes[len(self.found) :]

    @property
    def wanted(self) -> tuple[BlockHash, ...]:
        """Those of them that are of use: all, or those up to a state that is here or has come."""
        if self.state is None:
            return self.missing
        return self.hashes[len(self.found) : max(self.state.num_known, self.state.num_before)]

    @property
    def num_gained(self) -> int:
        """Blocks that need not be computed because of what has come."""
        if self.state is None:
            return self.num_filled
        num_here = len(self.found) + self.num_filled
        ends = (self.num_usable, self.state.num_known, self.state.num_before)
        return max(end for end in ends if end <= num_here) - self.num_usable


@dataclass(frozen=True, slots=True)
class LentState:
    """A recurrent state that another worker copies."""

    slot: int
    place: int
    """Of its key among those that were asked for."""


@dataclass(slots=True)
class KvTransferStore:
    """See the module."""

    pool: BlockPool
    cache: KVCache
    states: StateSlots | None = None
    """Of a model with recurrent states."""
    contents: BlockContents | None = None
    """Learns which blocks have come; None: nobody wants to know."""
    tables: list[list[int]] = field(default_factory=list)
    """Blocks that are held here."""

    def lend(self, keys: Sequence[BlockHash]) -> list[int]:
        """Hold the blocks of the longest known run from the first key on."""
        blocks = self.pool.find(keys)
        if blocks:
            self.pool.hold(blocks)
            self.tables.append(blocks)
            self.cache.side.follow()
        return blocks

    def end_loan(self, blocks: list[int], num_kept: int) -> None:
        """Release what was lent; another worker has copies of the first ``num_kept`` now."""
        self.pool.lend(blocks[:num_kept])
        self._release(blocks)
        broken = [b for b in blocks if self.pool.hash_of(b) is None and self.pool.is_free(b)]
        self.cache.clear(broken)  # forgotten while on loan: they may hold NaN

    def lend_state(self, keys: Sequence[bytes]) -> LentState | None:
        """Hold the last of these states that is known; None: none is, or no slot is left."""
        if self.states is None:
            return None
        hashes = [*map(state_key, keys)]
        count = self.states.num_known(hashes)
        slot = self.states.hold_extra(hashes[count - 1]) if count else None
        if slot is None:
            return None
        self.cache.side.follow()
        return LentState(slot, count - 1)

    def end_state_loan(self, state: LentState, *, is_kept: bool) -> None:
        """Release a state that was lent; ``is_kept``: another worker has a copy of it now."""
        assert self.states is not None, "a state was lent"
        if is_kept:
            self.states.lend(state.slot)
        self.states.release_extra(state.slot)

    def usable(self, request: Request, hashes: Sequence[BlockHash]) -> Sequence[BlockHash]:
        """Those of the hashes of a prompt's full blocks that it need not compute."""
        return hashes[: max(num_reusable(request), 0) // self.cache.block_size]

    def num_usable(self, hashes: Sequence[BlockHash], num_found: int) -> int:
        """Of the first ``num_found`` blocks of a prefix, which are here, those that are of use."""
        return num_found if self.states is None else self.states.num_known(hashes[:num_found])

    def begin(
        self, hashes: Sequence[BlockHash], found: Sequence[int], num_spare: int
    ) -> Fetch | None:
        """Hold the blocks of a prefix that are ``found`` here, and blocks for the rest.

        None where nothing is missing, or fewer blocks are free than the fetch needs with
        ``num_spare`` left to other requests, or no slot for a state.
        """
        num_usable = self.num_usable(hashes, len(found))
        num_missing = len(hashes) - len(found)
        num_kept = sum(self.pool.is_free(block) for block in found)
        if num_usable == len(hashes):
            return None
        if not self.pool.can_allocate(num_missing + num_kept + num_spare):
            return None
        state = None
        if self.states is not None and (num_known := self.states.num_known(hashes)) < len(hashes):
            slot = self.states.allocate_extra()
            if slot is None:
                return None
            state = StateFetch(slot=slot, num_known=num_known)
        self.pool.hold(found)
        fetch = Fetch(
            hashes=tuple(hashes),
            found=list(found),
            num_usable=num_usable,
            blocks=self.pool.allocate(num_missing),
            state=state,
        )
        self.tables += [fetch.found, fetch.blocks]
        self.cache.side.follow()
        return fetch

    def end(self, fetch: Fetch) -> None:
        """Publish the filled blocks under their hashes, and release all."""
        parents = (None, *fetch.hashes)[len(fetch.found) :]
        filled = fetch.blocks[: fetch.num_filled]
        for block, name, parent in zip(filled, fetch.missing, parents, strict=False):
            self.pool.store(block, name, parent)
        if self.contents is not None:
            self.contents.came(fetch.missing[: fetch.num_filled])
        state = fetch.state
        if state is not None and self.states is not None:
            if state.num_before:
                self.states.store(state.slot, fetch.hashes[state.num_before - 1])
            self.states.release_extra(state.slot)
        self._release(fetch.blocks, self.pool.begin(()))
        self._release(fetch.found)

    def _release(self, blocks: list[int], turn: Turn | None = None) -> None:
        self.tables.remove(blocks)
        self.pool.release(blocks, turn)
