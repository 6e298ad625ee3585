"""Tier in host memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor

from workers.kv.tiers.index import TierTurn
from workers.kv.tiers.tier import Tier


class HostTier(Tier):
    """Items in memory of this process. Data returned by ``read`` stays valid after eviction."""

    name: ClassVar[str] = "host"

    def __init__(
        self,
        capacity_bytes: int,
        max_kept: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(capacity_bytes, max_kept, clock)
        self._data: dict[bytes, Tensor] = {}

    def _write(self, turn: TierTurn, name: bytes, parent: bytes | None, data: Tensor) -> bool:
        # Pinned memory is allocated in powers of two and reserved for transfers.
        self._data[name] = data.clone() if data.is_pinned() else data
        return True

    def _read(self, name: bytes) -> Tensor | None:
        return self._data.get(name)

    def _erase(self, names: Sequence[bytes]) -> None:
        for name in names:
            self._data.pop(name, None)
