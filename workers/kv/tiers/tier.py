"""Base class of tiers: thread-safe stores of KV blocks and states."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

from torch import Tensor

from workers.kv.tiers.index import TierIndex, TierTurn
from workers.kv.turns import TurnUse
from workers.requests.block_hash import state_key


class Tier(ABC):
    """Stores items by name: the data of one KV block or state each. Any thread may call it.

    A turn puts its items between ``begin`` and ``end``, from the first block of its prefix on. The
    data of an item never changes.
    """

    name: ClassVar[str]
    """Name in metrics."""

    def __init__(
        self,
        capacity_bytes: int,
        max_kept: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``max_kept``: limit of items that one tenant's turns may keep longer than others."""
        self.capacity_bytes = capacity_bytes
        self.num_skipped = 0
        """Number of blocks of ended turns that the tier lacks: they left the pool before they were
        copied, no other item could be evicted for them, or a write failed."""
        self.num_broken = 0
        """Number of items that could not be read or were corrupt."""
        self._clock = clock
        self._lock = threading.Lock()
        self._order = TierIndex(capacity_bytes, max_kept)
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
        """Whether the tier has this item and it is a recurrent state."""
        return name in self._states

    def bytes_of(self, tenant: str) -> int:
        """Return the size of a tenant's items in bytes."""
        return self._order.bytes_of(tenant)

    def begin(self, use: TurnUse) -> TierTurn:
        """Begin a turn and hold the items of its prefix until ``end``."""
        with self._lock:
            return self._order.begin(use, self._clock())

    def extend(self, turn: TierTurn, use: TurnUse) -> None:
        """Replace ``turn.use`` by a longer use of the same prefix."""
        with self._lock:
            self._order.extend(turn, use)

    def put(self, turn: TierTurn, name: bytes, parent: bytes | None, data: Tensor) -> bool:
        """Store an item as the successor of ``parent``.

        ``data``: uint8 in CPU memory, which must not change afterwards. Returns False if the item
        cannot be stored; then no later item of the turn can be stored either.
        """
        with self._lock:
            is_kept = self._order.add(turn, name, parent, data.numel())
            evicted = self._leave(self._order.take_evicted())
            is_new = is_kept and name not in self._here
            if is_new and parent is not None and name == state_key(parent):
                self._states.add(name)
            self._erase(evicted)
        if is_new:
            is_kept = self._write(turn, name, parent, data)
            self._enter(name, is_written=is_kept)
        return is_kept

    def end(self, turn: TierTurn) -> None:
        """Make the turn's items evictable."""
        with self._lock:
            self._order.end(turn)
        self.skip(turn.use)

    def skip(self, use: TurnUse) -> None:
        """Count the items of a turn that the tier lacks, and will not get."""
        with self._lock:
            self.num_skipped += sum(name not in self._here for name, _ in use.items)

    def read(self, name: bytes) -> Tensor | None:
        """Return the data of an item, uint8 in CPU memory. None if it is missing or corrupt."""
        return self._read(name) if self.has(name) else None

    def forget(self, names: Iterable[bytes]) -> None:
        """Remove these items, so that they cannot be read."""
        with self._lock:
            known = [name for name in names if name in self._order]
            for name in known:
                self._order.forget(name)
            self._erase(self._leave(known))

    def take_touched(self) -> list[bytes]:
        """Return blocks that were added or removed since the last call."""
        with self._lock:
            touched, self._touched = self._touched, {}
        return list(touched)

    def check_integrity(self) -> None:
        """Assert that all counts are right. For tests, while no thread puts items."""
        with self._lock:
            self._order.check_integrity()
            assert self._here == set(self._order.names), "readable and known items differ"
            assert self._states <= self._here, "a state is missing"

    @abstractmethod
    def _write(self, turn: TierTurn, name: bytes, parent: bytes | None, data: Tensor) -> bool:
        """Store the data of an item; False if that fails."""

    @abstractmethod
    def _read(self, name: bytes) -> Tensor | None:
        """Return the data of an item; None if it is missing or corrupt."""

    @abstractmethod
    def _erase(self, names: Sequence[bytes]) -> None:
        """Free the memory of these items.

        Called with the lock held, so that no item is put again meanwhile. Must not wait for a disk.
        """

    def _enter(self, name: bytes, *, is_written: bool) -> None:
        """Make an added item readable, or remove it if its write failed."""
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
        """Make an item readable."""
        self._here.add(name)
        if name not in self._states:
            self._touched[name] = None

    def _leave(self, names: Sequence[bytes]) -> Sequence[bytes]:
        self._here.difference_update(names)
        self._touched.update(dict.fromkeys(name for name in names if name not in self._states))
        self._states.difference_update(names)
        return names
