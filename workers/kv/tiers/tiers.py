"""All lower tiers of one attention worker, the fastest first.

A tier has copies of items of the tiers above it, as its capacity and speed permit. A turn's blocks
are put into host memory; when the turn ends, a thread copies them from there to disk. Any thread
may call all methods. Only ``read`` and ``close`` wait for a disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from workers.kv.tiers.disk import DiskTier
from workers.kv.tiers.disk_writer import DiskWriter
from workers.kv.tiers.host import HostTier
from workers.kv.tiers.index import TierTurn
from workers.kv.tiers.tier import Tier
from workers.kv.turns import TurnUse
from workers.requests.block_hash import state_key

USABLE: Final = "kv_tier_usable"
"""Metric of a tier: 1 while blocks can be written to it."""


@dataclass(frozen=True, slots=True)
class TierItem:
    """An item that can be read."""

    tier: str
    """Name of the fastest tier that has the item."""
    data: Tensor
    """Data, uint8 in CPU memory; must not be changed."""


class KvTiers:
    """Writes the blocks of turns to the host tier and an optional disk tier, and reads them."""

    def __init__(self, host: HostTier, writer: DiskWriter | None = None) -> None:
        """``writer``: writer of the disk tier, if configured; this object then owns it."""
        self.host = host
        self._writer = writer
        self.names = (host.name,) if writer is None else (host.name, DiskTier.name)
        """Names of all configured tiers."""

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Tiers in use, the fastest first."""
        disk = None if self._writer is None else self._writer.disk
        return (self.host,) if disk is None else (self.host, disk)

    @property
    def problem(self) -> str:
        """Reason why a tier is not in use, as text; empty if all are in use."""
        return "" if self._writer is None else self._writer.problem

    def use(self, identity: str) -> None:
        """Set the identity of new blocks: everything besides tokens that determines the data."""
        if self._writer is not None:
            self._writer.use(identity)

    def close(self) -> None:
        """Stop writing, even within a turn, and close the tiers."""
        if self._writer is not None:
            self._writer.close()

    # Writing

    def begin(self, use: TurnUse) -> TierTurn:
        """Begin to put the blocks of a turn, which ran here or at another worker."""
        return self.host.begin(use)

    def extend(self, turn: TierTurn, use: TurnUse) -> None:
        """Replace ``turn.use`` by a longer use of the same prefix."""
        self.host.extend(turn, use)

    def put(self, turn: TierTurn, name: bytes, parent: bytes | None, data: Tensor) -> bool:
        """Store a block of the turn after its predecessors; it may be from another worker.

        ``data``: uint8 in CPU memory, which must not change afterwards. The name of a state is the
        ``state_key`` of its block, and its parent is the block. Returns False if the item cannot
        be stored; then no later item of the turn can be stored either.
        """
        return self.host.put(turn, name, parent, data)

    def end(self, turn: TierTurn) -> None:
        """End a turn after its blocks are put. Every ``begin`` needs an ``end``."""
        self.host.end(turn)
        if self._writer is not None and turn.use.may_outlive:
            self._writer.put(turn.use)

    def forget(self, names: Iterable[bytes]) -> None:
        """Remove these blocks, and the states after them, from all tiers."""
        known = [item for name in names for item in (name, state_key(name))]
        if not known:
            return
        self.host.forget(known)
        if self._writer is not None:
            self._writer.forget(known)

    # Reading

    def has(self, name: bytes) -> bool:
        """Whether a tier has this block or state."""
        return any(tier.has(name) for tier in self.tiers)

    def tier_of(self, name: bytes) -> str | None:
        """Return the name of the fastest tier that has an item, or None."""
        return next((tier.name for tier in self.tiers if tier.has(name)), None)

    def run(self, names: Sequence[bytes]) -> Sequence[bytes]:
        """Return the longest prefix of ``names`` that are all in tiers, each in any tier."""
        known = (i for i, name in enumerate(names) if not self.has(name) or self.is_state(name))
        return names[: next(known, len(names))]

    def is_state(self, name: bytes) -> bool:
        """Whether a tier has this item and it is a recurrent state."""
        return any(tier.is_state(name) for tier in self.tiers)

    def tiers_of(self, names: Sequence[bytes]) -> list[str]:
        """Return the name of each block's fastest tier, up to the first block that no tier has."""
        found: list[str] = []
        for name in names:
            for tier in self.tiers:
                if tier.has(name):
                    found.append(tier.name)
                    break
            else:
                break
        return found

    def read(self, name: bytes) -> TierItem | None:
        """Read a block or state from the fastest tier that can read it, or return None."""
        for tier in self.tiers:
            data = tier.read(name)
            if data is not None:
                return TierItem(tier.name, data)
        return None

    def take_touched(self) -> list[bytes]:
        """Return blocks that were added to or removed from a tier since the last call."""
        return list(dict.fromkeys(name for tier in self.tiers for name in tier.take_touched()))

    def stats(self) -> dict[str, float]:
        """Return gauges and counters by metric name without prefix."""
        found: dict[str, float] = {}
        for tier in self.tiers:
            name = tier.name
            found |= {
                f'kv_tier_bytes{{tier="{name}"}}': float(tier.num_bytes),
                f'kv_tier_capacity_bytes{{tier="{name}"}}': float(tier.capacity_bytes),
                f'kv_tier_skipped_total{{tier="{name}"}}': float(tier.num_skipped),
                f'kv_tier_broken_total{{tier="{name}"}}': float(tier.num_broken),
            }
        if self._writer is not None:
            is_usable = self._writer.disk is not None and not self.problem
            found[f'{USABLE}{{tier="{DiskTier.name}"}}'] = float(is_usable)
        return found

    def wait_written(self, timeout_s: float) -> bool:
        """Wait until no turn waits for the disk; False after ``timeout_s``. For tests."""
        return self._writer is None or self._writer.wait_written(timeout_s)
