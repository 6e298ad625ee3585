"""All lower tiers of one attention worker, the fastest first.

Each tier has copies of what the tiers above it hold, as far as it has room and time. A turn's
blocks are put into host memory; at its end a thread copies them to disk from there. Any thread may
call all methods; none waits for a disk but ``read`` and ``close``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from workers.kv.tiers.host import HostTier
from workers.kv.tiers.order import TierTurn, TurnUse
from workers.kv.tiers.tier import Tier


@dataclass(frozen=True, slots=True)
class Held:
    """An item that can be read."""

    tier: str
    """The fastest tier that has it."""
    data: Tensor
    """Its bytes, uint8 in CPU memory; not to be changed."""


class KvTiers:
    """See the module."""

    def __init__(self, host: HostTier) -> None:
        self.host = host
        self._tiers: tuple[Tier, ...] = (host,)

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

    def forget(self, names: Iterable[bytes]) -> None:
        """The contents of these blocks must not be found."""
        known = list(names)
        for tier in self._tiers:
            tier.forget(known)

    # What is held

    def has(self, name: bytes) -> bool:
        """Whether a tier has this block or state."""
        return any(tier.has(name) for tier in self._tiers)

    def tier_of(self, name: bytes) -> str | None:
        """The fastest tier that has it; None: none does."""
        return next((tier.name for tier in self._tiers if tier.has(name)), None)

    def tiers_of(self, names: Sequence[bytes]) -> list[str]:
        """The fastest tier of each of these blocks, up to the first that no tier has."""
        found: list[str] = []
        for name in names:
            tier = self.tier_of(name)
            if tier is None:
                break
            found.append(tier)
        return found

    def read(self, name: bytes) -> Held | None:
        """A block's or state's bytes, from the fastest tier that can give them."""
        for tier in self._tiers:
            data = tier.read(name)
            if data is not None:
                return Held(tier.name, data)
        return None
