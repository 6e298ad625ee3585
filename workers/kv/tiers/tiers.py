"""All lower tiers of one attention worker, the fastest first.

Each tier has copies of what the tiers above it hold, as far as it has room and time. A turn's
blocks are put into host memory; when it ends, a thread copies them to disk from there. Any thread
may call all methods; none but ``read`` and ``close`` waits for a disk.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from workers.kv.tiers.disk import DiskTier
from workers.kv.tiers.host import HostTier
from workers.kv.tiers.order import TierTurn, TurnUse
from workers.kv.tiers.tier import Tier
from workers.requests.block_hash import state_key

MAX_WAITING = 256
"""Turns that may wait for the disk; the oldest are left out first."""
_STOP_S = 5.0


@dataclass(frozen=True, slots=True)
class Held:
    """An item that can be read."""

    tier: str
    """The fastest tier that has it."""
    data: Tensor
    """Its bytes, uint8 in CPU memory; not to be changed."""


class KvTiers:
    """See the module."""

    def __init__(self, host: HostTier, disk: DiskTier | None = None) -> None:
        """``disk`` belongs to this object from now on."""
        self.host = host
        self._disk = disk
        self.tiers: tuple[Tier, ...] = (host,) if disk is None else (host, disk)
        self._waiting: deque[TurnUse] = deque()
        self._changed = threading.Condition()
        self._is_busy = False
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="kv-disk-writer", daemon=True)
        if disk is not None:
            self._thread.start()

    def close(self) -> None:
        """Write no more; the turn under way is cut short."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._disk is not None:
            self._thread.join(_STOP_S)
            self._disk.close()

    # Blocks that come in

    def begin(self, use: TurnUse) -> TierTurn:
        """A turn has used this prefix, here or at another worker: its blocks may be put."""
        return self.host.begin(use)

    def put(self, turn: TierTurn, name: bytes, parent: bytes | None, data: Tensor) -> bool:
        """Keep a block of the turn, those before it first; for blocks of other workers as well.

        ``data`` are its bytes, uint8 in CPU memory, which nobody changes any more. A state has the
        ``state_key`` of its block as its name, and the block as its parent. False where it cannot
        be kept: the later ones of the turn cannot, either.
        """
        return self.host.put(turn, name, parent, data)

    def end(self, turn: TierTurn) -> None:
        """The turn's blocks are put, as far as they could be; must follow every ``begin``."""
        self.host.end(turn)
        if self._disk is None or not turn.use.may_outlive:
            return
        with self._changed:
            if len(self._waiting) == MAX_WAITING:
                self._disk.num_skipped += len(self._waiting.popleft().names)
            self._waiting.append(turn.use)
            self._changed.notify_all()

    def forget(self, names: Iterable[bytes]) -> None:
        """The contents of these blocks, and the states behind them, must not be found."""
        known = [item for name in names for item in (name, state_key(name))]
        for tier in self.tiers:
            tier.forget(known)

    # What is held

    def has(self, name: bytes) -> bool:
        """Whether a tier has this block or state."""
        return any(tier.has(name) for tier in self.tiers)

    def tier_of(self, name: bytes) -> str | None:
        """The fastest tier that has it; None: none does."""
        return next((tier.name for tier in self.tiers if tier.has(name)), None)

    def run(self, names: Sequence[bytes]) -> Sequence[bytes]:
        """Those of these blocks, from the first on, that a tier has."""
        known = (i for i, name in enumerate(names) if not self.has(name) or self.is_state(name))
        return names[: next(known, len(names))]

    def is_state(self, name: bytes) -> bool:
        """Whether it is a recurrent state that a tier has."""
        return any(tier.is_state(name) for tier in self.tiers)

    def tiers_of(self, names: Sequence[bytes]) -> list[str]:
        """The fastest tier of each of these blocks, up to the first that no tier has."""
        found: list[str] = []
        for name in names:
            for tier in self.tiers:
                if tier.has(name):
                    found.append(tier.name)
                    break
            else:
                break
        return found

    def read(self, name: bytes) -> Held | None:
        """A block's or state's bytes, from the fastest tier that can give them."""
        for tier in self.tiers:
            data = tier.read(name)
            if data is not None:
                return Held(tier.name, data)
        return None

    def take_touched(self) -> list[bytes]:
        """Blocks that came into a tier or left it since the last call."""
        return list(dict.fromkeys(name for tier in self.tiers for name in tier.take_touched()))

    def stats(self) -> dict[str, float]:
        """Gauges and counters by metric name without prefix."""
        found: dict[str, float] = {}
        for tier in self.tiers:
            name = tier.name
            found |= {
                f'kv_tier_bytes{{tier="{name}"}}': float(tier.num_bytes),
                f'kv_tier_capacity_bytes{{tier="{name}"}}': float(tier.capacity_bytes),
                f'kv_tier_skipped_total{{tier="{name}"}}': float(tier.num_skipped),
                f'kv_tier_broken_total{{tier="{name}"}}': float(tier.num_broken),
            }
        return found

    def wait_written(self, timeout_s: float) -> bool:
        """Wait until no turn waits for the disk; False where it takes longer. For tests."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._waiting and not self._is_busy, timeout_s
            )

    # The disk's thread

    def _run(self) -> None:
        while (use := self._next()) is not None:
            self._write(use)

    def _next(self) -> TurnUse | None:
        """The next turn, the oldest first; None: the end."""
        with self._changed:
            self._is_busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            self._is_busy = not self._is_closed
            return None if self._is_closed else self._waiting.popleft()

    def _write(self, use: TurnUse) -> None:
        """Copy what the disk lacks of a turn's blocks, as far as host memory has them."""
        assert self._disk is not None, "only a disk has this thread"
        turn = self._disk.begin(use)
        for name, parent in use.items:
            if self._is_closed:
                break
            if self._disk.has(name):
                continue
            data = self.host.read(name)
            if data is None or not self._disk.put(turn, name, parent, data):
                break
        self._disk.end(turn)
