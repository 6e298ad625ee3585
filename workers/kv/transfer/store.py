"""Transfer of blocks and recurrent states between the pools of two workers.

Only the engine thread uses ``KvTransferStore``, like the pool. A held block with a hash does not
change. An item of the transfer (``workers.transport.peer_link``) is one block, with its data from
all layers in order. The key of an item is the hash of the block. As the hash covers tokens and
tenant, a worker can fetch only blocks of prompts that it has itself.

A model with recurrent states can use blocks only up to a known state. A worker first requests a
state: it sends the ``state_key`` of each block after which a state would help. It receives the last
of these states that the peer has, as one item: the index of its key, int64, and the state,
[layers, values] float32. Then it requests the blocks up to that state.
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
    """A recurrent state that is being fetched."""

    slot: int
    """Slot to fill, held during the fetch."""
    num_known: int
    """Number of blocks up to the last state that was cached when the fetch began, or 0. Only the
    state of a later block is useful."""
    num_before: int = 0
    """Number of blocks up to the fetched state; 0 until the fetching thread has filled it."""


@dataclass(kw_only=True, slots=True, eq=False)
class Fetch:
    """Blocks being fetched or restored. They are held, and can be found only afterwards."""

    hashes: tuple[BlockHash, ...]
    """Hashes of the prefix, from the first block of the sequence on."""
    found: list[int]
    """Blocks that the pool had when the fetch began, held during the fetch."""
    num_usable: int
    """Number of usable blocks of ``found`` when the fetch began: all, or up to a cached state."""
    blocks: list[int]
    """Blocks allocated for the hashes after ``found``."""
    num_filled: int = 0
    """Number of ``blocks`` that are filled, in order; written by the thread that fills them."""
    state: StateFetch | None = None
    """State to fetch; None if the model has no states, or the state after the prefix is known."""

    def lacks(self, block_hash: BlockHash) -> bool:
        """Whether a block of the prefix was not usable when the fetch began."""
        return block_hash in self.hashes[self.num_usable :]

    @property
    def missing(self) -> tuple[BlockHash, ...]:
        """Hashes of the prefix that the pool lacked when the fetch began."""
        return self.hashes[len(self.found) :]

    @property
    def wanted(self) -> tuple[BlockHash, ...]:
        """Missing hashes that are useful: all, or up to the last cached or fetched ``state``."""
        if self.state is None:
            return self.missing
        return self.hashes[len(self.found) : max(self.state.num_known, self.state.num_before)]

    @property
    def num_gained(self) -> int:
        """Number of blocks that need not be computed thanks to the fetch."""
        if self.state is None:
            return self.num_filled
        num_here = len(self.found) + self.num_filled
        ends = (self.num_usable, self.state.num_known, self.state.num_before)
        return max(end for end in ends if end <= num_here) - self.num_usable


@dataclass(frozen=True, slots=True)
class ProvidedState:
    """A recurrent state that is held while another worker or a tier copies it."""

    slot: int
    place: int
    """Index of its key among the requested keys."""


@dataclass(slots=True)
class KvTransferStore:
    """Holds blocks and states during a transfer to or from another worker or a tier."""

    pool: BlockPool
    cache: KVCache
    states: StateSlots | None = None
    """Slots of a model with recurrent states."""
    contents: BlockContents | None = None
    """Receives the hashes of fetched or restored blocks; None if KV events are disabled."""
    tables: list[list[int]] = field(default_factory=list)
    """Lists of blocks that are held for transfers."""

    def acquire(self, keys: Sequence[BlockHash]) -> list[int]:
        """Hold and return the blocks of the longest known prefix of ``keys``."""
        blocks = self.pool.find(keys)
        if blocks:
            self.pool.hold(blocks)
            self.tables.append(blocks)
            self.cache.side.follow()
        return blocks

    def release(self, blocks: list[int], num_kept: int) -> None:
        """Release blocks of ``acquire``. Another worker has copied the first ``num_kept``."""
        self.pool.mark_duplicated(blocks[:num_kept])
        self._release_known(blocks)

    def acquire_state(self, keys: Sequence[bytes]) -> ProvidedState | None:
        """Hold the last known state of ``keys``. None if none is known or no slot is left."""
        if self.states is None:
            return None
        hashes = [*map(state_key, keys)]
        count = self.states.num_known(hashes)
        slot = self.states.hold_extra(hashes[count - 1]) if count else None
        if slot is None:
            return None
        self.cache.side.follow()
        return ProvidedState(slot, count - 1)

    def release_state(self, state: ProvidedState, *, is_kept: bool) -> None:
        """Release a state. ``is_kept``: another worker has a copy of it now."""
        assert self.states is not None, "the store has no states"
        if is_kept:
            self.states.mark_duplicated(state.slot)
        self.states.release_extra(state.slot)

    def usable(self, request: Request, hashes: Sequence[BlockHash]) -> Sequence[BlockHash]:
        """Return the hashes of a prompt's full blocks that it may reuse.

        With output so far, the request has computed its prompt elsewhere, and may reuse all.
        """
        if request.output_so_far and request.inspection is None:
            return hashes
        return hashes[: max(num_reusable(request), 0) // self.cache.block_size]

    def num_usable(self, hashes: Sequence[BlockHash], num_found: int) -> int:
        """Number of usable blocks among the first ``num_found`` blocks of a prefix."""
        return num_found if self.states is None else self.states.num_known(hashes[:num_found])

    def begin(
        self, hashes: Sequence[BlockHash], found: Sequence[int], num_spare: int
    ) -> Fetch | None:
        """Hold the ``found`` blocks of a prefix and allocate blocks for the hashes after them.

        None if all blocks are usable, if the fetch would leave fewer than ``num_spare`` free
        blocks, or if no slot for a state is left.
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
        """Store the filled blocks and the fetched state under their hashes, and release all."""
        parents = (None, *fetch.hashes)[len(fetch.found) :]
        filled = fetch.blocks[: fetch.num_filled]
        for block, name, parent in zip(filled, fetch.missing, parents, strict=False):
            self.pool.store(block, name, parent)
        if self.contents is not None:
            self.contents.note_fetched(fetch.missing[: fetch.num_filled])
        state = fetch.state
        if state is not None and self.states is not None:
            if state.num_before:
                self.states.store(state.slot, fetch.hashes[state.num_before - 1])
            self.states.release_extra(state.slot)
        self._release(fetch.blocks, self.pool.begin(()))
        self._release_known(fetch.found)

    def _release_known(self, blocks: list[int]) -> None:
        """Release blocks that had a hash when they were held."""
        self._release(blocks)
        broken = [b for b in blocks if self.pool.hash_of(b) is None and self.pool.is_free(b)]
        self.cache.clear(broken)  # forgotten while held: they may contain NaN

    def _release(self, blocks: list[int], turn: Turn | None = None) -> None:
        self.tables.remove(blocks)
        self.pool.release(blocks, turn)
