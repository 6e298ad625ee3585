"""Provides blocks and recurrent states to other workers.

The threads of the KV server request items from ``KvBlockProvider``. Between two steps, the engine
thread holds the requested blocks, so that they stay unchanged while they are sent. Blocks of paused
requests are held already (``OfferedBlocks``). Items of lower tiers are provided as well.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workers.kv.tiers.tiers import KvTiers
from workers.kv.transfer.offered_blocks import OfferedBlock, OfferedBlocks
from workers.kv.transfer.store import KvTransferStore, ProvidedState


@dataclass(frozen=True, slots=True)
class ProvidedCopy:
    """A block or state in a lower tier."""

    name: bytes
    place: int | None = None
    """Index of a state's key among the requested keys; None for a block."""


ProvidedItem = int | ProvidedState | ProvidedCopy | OfferedBlock
"""A block in the pool, a state in a slot, either in a lower tier, or a block of an offer."""


@dataclass(slots=True)
class KvBlockProvider:
    """Provides items of a store. Only ``serve_requests`` runs on the engine thread."""

    store: KvTransferStore
    wake: Callable[[], None]
    """Called when the engine thread should call ``serve_requests``."""
    timeout_s: float = 10.0
    """Longest wait for the engine thread, as a step may be long."""
    tiers: KvTiers | None = None
    """Lower tiers, which provide items that the pool lacks."""
    offers: OfferedBlocks = field(init=False)
    """Blocks of paused requests."""
    _requested: deque[tuple[Sequence[bytes], Future[list[ProvidedItem]]]] = field(
        default_factory=deque
    )
    _returned: deque[tuple[list[ProvidedItem], int]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.offers = OfferedBlocks(self.store)

    def acquire(self, keys: Sequence[bytes]) -> list[ProvidedItem]:
        """Acquire blocks or one state; empty if none is known, or after ``timeout_s``."""
        if keys and (offered := self.offers.take(keys)):
            return [*offered]
        items: Future[list[ProvidedItem]] = Future()
        self._requested.append((keys, items))
        self.wake()
        try:
            return items.result(self.timeout_s)
        except TimeoutError:
            return [] if items.cancel() else items.result()

    def read(self, item: ProvidedItem) -> tuple[Tensor, ...]:
        cache = self.store.cache
        if isinstance(item, ProvidedState):
            return torch.tensor([item.place]), cache.read_state(item.slot)
        if isinstance(item, ProvidedCopy):
            return self._read_copy(item)
        block = item.block if isinstance(item, OfferedBlock) else item
        return (cache.read_block(block),)

    def _read_copy(self, copy: ProvidedCopy) -> tuple[Tensor, ...]:
        """Read an item of a tier.

        Raises ``ConnectionError`` if it was evicted; the client uses the items received before.
        """
        held = None if self.tiers is None else self.tiers.read(copy.name)
        if held is None:
            raise ConnectionAbortedError(f"KV block {copy.name.hex()} was evicted")
        data = (held.data,)
        return data if copy.place is None else (torch.tensor([copy.place]), *data)

    def release(self, items: list[ProvidedItem], num_kept: int) -> None:
        offered = [item for item in items if isinstance(item, OfferedBlock)]
        if offered:
            self.offers.give_back(offered[0].offer, [item.block for item in offered[:num_kept]])
        elif items:
            self._returned.append((items, num_kept))
            self.wake()

    def serve_requests(self) -> None:
        """Release items that were given back, then acquire items for the waiting requests."""
        while self._returned:
            self._release(*self._returned.popleft())
        while self._requested:
            keys, items = self._requested.popleft()
            if items.set_running_or_notify_cancel():
                items.set_result(self._acquire(keys))

    def _acquire(self, keys: Sequence[bytes]) -> list[ProvidedItem]:
        blocks = self.store.acquire(keys)
        copies = () if self.tiers is None else self.tiers.run(keys[len(blocks) :])
        if blocks or copies:
            return [*blocks, *map(ProvidedCopy, copies)]
        return self._acquire_state(keys)

    def _acquire_state(self, keys: Sequence[bytes]) -> list[ProvidedItem]:
        """Acquire the last of these states that the pool or a tier has."""
        state, tiers = self.store.acquire_state(keys), self.tiers
        places = range(len(keys) - 1, -1 if state is None else state.place, -1)
        place = next((p for p in places if tiers is not None and tiers.is_state(keys[p])), None)
        if place is None:
            return [] if state is None else [state]
        if state is not None:
            self.store.release_state(state, is_kept=False)
        return [ProvidedCopy(keys[place], place)]

    def _release(self, items: list[ProvidedItem], num_kept: int) -> None:
        blocks = [item for item in items if isinstance(item, int)]
        if blocks:
            self.store.release(blocks, num_kept)
        for item in items:
            if isinstance(item, ProvidedState):
                self.store.release_state(item, is_kept=num_kept > 0)
