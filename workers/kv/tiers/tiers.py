"""All lower tiers of one attention worker, the fastest first.

Each tier has copies of what the tiers above it hold, as far as it has room and time. A turn's
blocks are put into host memory; when it ends, a thread copies them to disk from there. Any thread
may call all methods; none but ``read`` and ``close`` waits for a disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from workers.kv.tiers.disk import DiskTier
from workers.kv.tiers.disk_writer import DiskWriter
from workers.kv.tiers.host import HostTier
from workers.kv.tiers.order import TierTurn
from workers.kv.tiers.tier import Tier
from workers.kv.turns import TurnUse
from workers.requests.block_hash import state_key

USABLE: Final = "kv_tier_usable"
"""Metric of a tier: 1 while blocks can be written to it."""


@dataclass(frozen=True, slots=True)
class TierItem:
    """An item that can be read."""

    tier: str
    """The fastest tier that has it."""
    data: Tensor
    """Its bytes, uint8 in CPU memory; not to be changed."""


class KvTiers:
    """See the module."""

    def __init__(self, host: HostTier, writer: DiskWriter | None = None) -> None:
        """``writer`` has the tier on disk, if any, and belongs to this object from now on."""
        self.host = host
        self._writer = writer
        self.names = (host.name,) if writer is None else (host.name, DiskTier.name)
        """Of all tiers that there may be."""

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Those in use, the fastest first."""
        disk = None if self._writer is None else self._writer.disk
        return (self.host,) if disk is None else (self.host, disk)

    @property
    def problem(self) -> str:
        """Why a tier is not used, for people; empty if all are."""
        return "" if self._writer is None else self._writer.problem

    def use(self, identity: str) -> None:
        """What blocks are computed with from now on, beside their tokens."""
        if self._writer is not None:
            self._writer.use(identity)

    def close(self) -> None:
        """Write no more; the turn under way is cut short."""
        if self._writer is not None:
            self._writer.close()

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
        if self._writer is not None and turn.use.may_outlive:
            self._writer.put(turn.use)

    def forget(self, names: Iterable[bytes]) -> None:
        """The contents of these blocks, and the states behind them, must not be found."""
        known = [item for name in names for item in (name, state_key(name))]
        if not known:
            return
        self.host.forget(known)
        if self._writer is not None:
            self._writer.forget(known)

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

    def read(self, name: bytes) -> TierItem | None:
        """A block's or state's bytes, from the fastest tier that can give them."""
        for tier in self.tiers:
            data = tier.read(name)
            if data is not None:
                return TierItem(tier.name, data)
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
        if self._writer is not None:
            is_usable = self._writer.disk is not None and not self.problem
            found[f'{USABLE}{{tier="{DiskTier.name}"}}'] = float(is_usable)
        return found

    def wait_written(self, timeout_s: float) -> bool:
        """Wait until no turn waits for the disk; False where it takes longer. For tests."""
        return self._writer is None or self._writer.wait_written(timeout_s)
