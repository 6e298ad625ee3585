"""Turns: what one request leaves in the cache, and what it says of it. Plain data."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from workers.requests.block_hash import state_key


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepHints:
    """What a request says of the blocks that it leaves."""

    tenant: str = ""
    """Whose request it is."""
    session: str = ""
    """Session of the tenant to which it belongs; empty: it names none."""
    keep_s: float | None = None
    """Time for which its blocks are kept before others; 0: nobody will use them again; None: it
    does not say."""
    priority: int = 0
    """Of the request: blocks of lower values are kept longer."""


NO_HINTS = KeepHints()
"""Of requests that say nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnUse:
    """A turn's use of a prefix."""

    names: Sequence[bytes]
    """Of all its full blocks, in order."""
    num_prompt: int
    """Blocks of them that its prompt had; a next turn has those, too."""
    hints: KeepHints
    states: Sequence[bytes] = ()
    """Those of the blocks behind which the recurrent state is kept as well."""
    may_outlive: bool = True
    """Whether the names mean the same after a restart; those of adapters do not."""

    @property
    def items(self) -> list[tuple[bytes, bytes | None]]:
        """All blocks and states, each with its parent, in the order in which they are put."""
        parents = (None, *self.names)
        blocks = list(zip(self.names, parents, strict=False))
        return [*blocks, *((state_key(name), name) for name in self.states)]


@dataclass(slots=True, eq=False)
class Turn:
    """One request's use of a prefix, and the free blocks whose last use it was.

    ``TurnAges`` and ``TurnQueues`` fill all fields after the first four.
    """

    hints: KeepHints
    kind: int
    """See ``ReuseRates.kind``."""
    num_before: int = 0
    """Turns that it continues."""
    tail: bytes | None = None
    """Last block of its prompt, which a next turn uses again; None: nothing is learned from it."""
    blocks: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    """In the order in which they were freed: ends of prefixes first."""
    freed: int = -1
    """When it ended, in blocks freed; -1: it has not."""
    age_bin: int = -1
    """Bin of its age; -1: it does not age."""
    is_kept: bool = False
    """Its blocks are kept before others."""
    is_over: bool = False
    """It was used again, or is forgotten: nothing more is learned from it."""
    queue: OrderedDict[Turn, None] | None = None
    """Where it waits for its eviction; None: it has no free blocks."""


TurnQueue = OrderedDict[Turn, None]
"""Turns that are evicted in this order."""
