"""Provides blocks and recurrent states to other workers.

The threads of the KV server request items from ``KvLender``, and the engine thread holds the blocks
between two steps. Items that only a lower tier has are provided as well.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workers.kv.tiers.tiers import KvTiers
from workers.kv.transfer.store import KvTransferStore, LentState


@dataclass(frozen=True, slots=True)
class LentCopy:
    """A block or state in a lower tier."""

    name: bytes
    place: int | None = None
    """Index of a state's key among the requested keys; None for a block."""


LentItem = int | LentState | LentCopy
"""A block in the pool, a state in a slot, or either in a lower tier."""


@dataclass(slots=True)
class KvLender:
    """Provides items of a store. Only the engine thread calls ``answer``; others the rest."""

    store: KvTransferStore
    wake: Callable[[], None]
    """Called when the engine thread should call ``answer``."""
    timeout_s: float = 10.0
    """Longest wait for the engine thread, as a step may be long."""
    tiers: KvTiers | None = None
    """Lower tiers, which provide items that the pool lacks."""
    _asked: deque[tuple[Sequence[bytes], Future[list[LentItem]]]] = field(default_factory=deque)
    _returned: deque[tuple[list[LentItem], int]] = field(default_factory=deque)

    def borrow(self, keys: Sequence[bytes]) -> list[LentItem]:
        """Acquire blocks or one state. Empty if the engine thread does not respond in time."""
        items: Future[list[LentItem]] = Future()
        self._asked.append((keys, items))
        self.wake()
        try:
            return items.result(self.timeout_s)
        except TimeoutError:
            return [] if items.cancel() else items.result()

    def read(self, item: LentItem) -> tuple[Tensor, ...]:
        cache = self.store.cache
        if isinstance(item, LentState):
            return torch.tensor([item.place]), cache.read_state(item.slot)
        if isinstance(item, LentCopy):
            return self._read_copy(item)
        return (cache.read_block(item),)

    def _read_copy(self, copy: LentCopy) -> tuple[Tensor, ...]:
        """Read an item of a tier.

        Raises ``ConnectionError`` if it was evicted; the client uses the items received before.
        """
        held = None if self.tiers is None else self.tiers.read(copy.name)
        if held is None:
            raise ConnectionAbortedError(f"KV block {copy.name.hex()} was evicted")
        data = (held.data,)
        return data if copy.place is None else (torch.tensor([copy.place]), *data)

    def give_back(self, items: list[LentItem], num_kept: int) -> None:
        if items:
            self._returned.append((items, num_kept))
            self.wake()

    def answer(self) -> None:
        """Release the returned items, then acquire items for the waiting requests."""
        while self._returned:
            self._end(*self._returned.popleft())
        while self._asked:
            keys, items = self._asked.popleft()
            if items.set_running_or_notify_cancel():
                items.set_result(self._lend(keys))

    def _lend(self, keys: Sequence[bytes]) -> list[LentItem]:
        blocks = self.store.lend(keys)
        copies = () if self.tiers is None else self.tiers.run(keys[len(blocks) :])
        if blocks or copies:
            return [*blocks, *map(LentCopy, copies)]
        return self._lend_state(keys)

    def _lend_state(self, keys: Sequence[bytes]) -> list[LentItem]:
        """Acquire the last of these states that the pool or a tier has."""
        state, tiers = self.store.lend_state(keys), self.tiers
        places = range(len(keys) - 1, -1 if state is None else state.place, -1)
        place = next((p for p in places if tiers is not None and tiers.is_state(keys[p])), None)
        if place is None:
            return [] if state is None else [state]
        if state is not None:
            self.store.end_state_loan(state, is_kept=False)
        return [LentCopy(keys[place], place)]

    def _end(self, items: list[LentItem], num_kept: int) -> None:
        blocks = [item for item in items if isinstance(item, int)]
        if blocks:
            self.store.end_loan(blocks, num_kept)
        for item in items:
            if isinstance(item, LentState):
                self.store.end_state_loan(item, is_kept=num_kept > 0)
