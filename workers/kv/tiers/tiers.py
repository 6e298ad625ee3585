"""All lower tiers of one attention worker, the fastest first.

Each tier has copies of what the tiers above it hold, as far as it has room and time. A turn's
blocks are put into host memory; when it ends, a thread copies them to disk from there. Any thread
may call all methods; none but ``read`` and ``close`` waits for a disk.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from workers.kv.tiers.disk import DiskTier
from workers.kv.tiers.host import HostTier
from workers.kv.tiers.order import TierTurn
from workers.kv.tiers.tier import Tier
from workers.kv.turns import TurnUse
from workers.requests.block_hash import state_key

logger = logging.getLogger(__name__)

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
        self._num_forgets = 0
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
            if not self._thread.is_alive():  # else it may write yet: the folder stays its own
                self._disk.close()

    # Blocks that come in

    def begin(self, use: TurnUse) -> TierTurn:
        """A turn has used this prefix, here or at another worker: its blocks may be put."""
        return self.host.begin(use)

    def extend(self, turn: TierTurn, use: TurnUse) -> None:
        """A turn that began with the first blocks of its prefix uses all of this."""
        self.host.extend(turn, use)

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
        if not known:
            return
        for tier in self.tiers:
            tier.forget(known)
            self._num_forgets += 1  # after host memory, before the disk: see _copy
        with self._changed:
            self._changed.notify_all()

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
        while self._wait():
            try:
                self._go_on()
            except Exception:  # memory that is missing, for example: the next turn is written
                logger.exception("KV blocks are not written to disk")

    def _wait(self) -> bool:
        """Wait for something to write or delete; False: the end."""
        assert self._disk is not None, "only a disk has this thread"
        disk = self._disk
        with self._changed:
            self._is_busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting or disk.num_unerased or self._is_closed)
            self._is_busy = not self._is_closed
            return self._is_busy

    def _go_on(self) -> None:
        """Delete what was forgotten, and write the next turn, the oldest first."""
        assert self._disk is not None, "only a disk has this thread"
        self._disk.erase()
        with self._changed:
            use = self._waiting.popleft() if self._waiting else None
        if use is None:
            return
        turn = self._disk.begin(use)
        try:
            self._write(self._disk, turn)
        finally:
            self._disk.end(turn)

    def _write(self, disk: DiskTier, turn: TierTurn) -> None:
        """Copy what the disk lacks of a turn's blocks, as far as host memory has them."""
        for name, parent in turn.use.items:
            if self._is_closed or not (disk.has(name) or self._copy(disk, turn, name, parent)):
                break

    def _copy(self, disk: DiskTier, turn: TierTurn, name: bytes, parent: bytes | None) -> bool:
        num_forgets = self._num_forgets
        data = self.host.read(name)
        if data is None or not disk.put(turn, name, parent, data):
            return False
        if self._num_forgets != num_forgets:  # this one, maybe, before it was on disk
            disk.forget((name,))
            return False
        return True
