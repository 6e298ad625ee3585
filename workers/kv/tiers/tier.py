"""One tier: what it holds, behind a lock, so that any thread may use it."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

from torch import Tensor

from workers.kv.tiers.order import TierOrder, TierTurn
from workers.kv.turns import TurnUse
from workers.requests.block_hash import state_key


class Tier(ABC):
    """Items by name, each the bytes of one KV block or state. Any thread may call it.

    A turn puts what it leaves between ``begin`` and ``end``, from the first block of its prefix on.
    Bytes that are in a tier do not change.
    """

    name: ClassVar[str]
    """In metrics."""

    def __init__(
        self,
        capacity_bytes: int,
        max_kept: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``max_kept``: items that one tenant's turns may have kept before others."""
        self.capacity_bytes = capacity_bytes
        self.num_skipped = 0
        """Blocks that turns left and that are not here at their end: they were gone before they
        could be copied, nothing gave way to them, or they could not be written."""
        self.num_broken = 0
        """Items that could not be read, or were not what had been written."""
        self._clock = clock
        self._lock = threading.Lock()
        self._order = TierOrder(capacity_bytes, max_kept)
        self._here: set[bytes] = set()
        self._states: set[bytes] = set()
        self._touched: dict[bytes, None] = {}

    @property
    def num_bytes(self) -> int:
        return self._order.num_bytes

    def has(self, name: bytes) -> bool:
        """Whether an item can be read."""
        return name in self._here

    def is_state(self, name: bytes) -> bool:
        """Whether an item that is here is a recurrent state."""
        return name in self._states

    def bytes_of(self, tenant: str) -> int:
        """Bytes of a tenant's items."""
        return self._order.bytes_of(tenant)

    def begin(self, use: TurnUse) -> TierTurn:
        """A turn has used this prefix; what is here of it stays until ``end``."""
        with self._lock:
            return self._order.begin(use, self._clock())

    def extend(self, turn: TierTurn, use: TurnUse) -> None:
        """A turn that began with the first blocks of its prefix uses all of this."""
        with self._lock:
            self._order.extend(turn, use)

    def put(self, turn: TierTurn, name: bytes, parent: bytes | None, data: Tensor) -> bool:
        """Keep an item behind ``parent``, the one before it: uint8 in CPU memory, not to be changed
        from now on. False where it cannot be; then no later one of the turn can, either.
        """
        with self._lock:
            is_kept = self._order.add(turn, name, parent, data.numel())
            gone = self._leave(self._order.take_gone())
            is_new = is_kept and name not in self._here
            if is_new and parent is not None and name == state_key(parent):
                self._states.add(name)
            self._erase(gone)
        if is_new:
            is_kept = self._write(turn, name, parent, data)
            self._enter(name, is_written=is_kept)
        return is_kept

    def end(self, turn: TierTurn) -> None:
        """The turn's items may give way to others from now on."""
        with self._lock:
            self._order.end(turn)
        self.num_skipped += sum(name not in self._here for name, _ in turn.use.items)

    def read(self, name: bytes) -> Tensor | None:
        """The bytes of an item, uint8 in CPU memory; None where it is not here, or broken."""
        return self._read(name) if self.has(name) else None

    def forget(self, names: Iterable[bytes]) -> None:
        """These items must not be read any more."""
        with self._lock:
            known = [name for name in names if name in self._order]
            for name in known:
                self._order.forget(name)
            self._erase(self._leave(known))

    def take_touched(self) -> list[bytes]:
        """Blocks that came or went since the last call."""
        with self._lock:
            touched, self._touched = self._touched, {}
        return list(touched)

    def check_integrity(self) -> None:
        """Assert that all counts are right; for tests, while no thread puts anything."""
        with self._lock:
            self._order.check_integrity()
            assert self._here == set(self._order.names), "items and bytes differ"
            assert self._states <= self._here, "a state is not here"

    @abstractmethod
    def _write(self, turn: TierTurn, name: bytes, parent: bytes | None, data: Tensor) -> bool:
        """Store the bytes of an item; False where they cannot be."""

    @abstractmethod
    def _read(self, name: bytes) -> Tensor | None:
        """The bytes of an item; None where they are gone or broken."""

    @abstractmethod
    def _erase(self, names: Sequence[bytes]) -> None:
        """Give back the room of these items. Under the lock, so that none is put again before: it
        must not wait for a disk."""

    def _enter(self, name: bytes, *, is_written: bool) -> None:
        """An item that was added has its bytes now, or never will."""
        with self._lock:
            is_known = name in self._order
            if is_known and is_written:
                self._show(name)
                return
            if is_known:
                self._order.forget(name)
            self._states.discard(name)
            self._erase((name,))

    def _show(self, name: bytes) -> None:
        """An item can be read from now on."""
        self._here.add(name)
        if name not in self._states:
            self._touched[name] = None

    def _leave(self, names: Sequence[bytes]) -> Sequence[bytes]:
        self._here.difference_update(names)
        self._touched.update(dict.fromkeys(name for name in names if name not in self._states))
        self._states.difference_update(names)
        return names
