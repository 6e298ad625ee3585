"""Turns, the blocks that one request leaves in the cache, and keep hints. Plain data."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from workers.requests.block_hash import state_key


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepHints:
    """Hints of a request about keeping the blocks that it leaves."""

    tenant: str = ""
    session: str = ""
    """Session of the tenant; empty if the request has none."""
    keep_s: float | None = None
    """Seconds for which blocks are kept longer than others; 0: they will not be used again; None:
    no hint."""
    priority: int = 0
    """Priority of the request: blocks of lower values are kept longer."""


NO_HINTS = KeepHints()
"""Hints of a request without any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnUse:
    """Full blocks and recurrent states of a prefix that a turn uses."""

    names: Sequence[bytes]
    """Names of all full blocks, in order."""
    num_prompt: int
    """Number of blocks of the prompt, which a next turn has too."""
    hints: KeepHints
    states: Sequence[bytes] = ()
    """Names of the blocks after which the recurrent state is kept as well."""
    may_outlive: bool = True
    """Whether the names stay valid after a restart. Names of blocks with an adapter do not."""

    @property
    def items(self) -> list[tuple[bytes, bytes | None]]:
        """All blocks and states with their parents, in the order in which they are put."""
        parents = (None, *self.names)
        blocks = list(zip(self.names, parents, strict=False))
        return [*blocks, *((state_key(name), name) for name in self.states)]


@dataclass(slots=True, eq=False)
class Turn:
    """One request's use of a prefix, and the free blocks that it used last.

    ``TurnAges`` and ``TurnQueues`` set all fields from ``blocks`` on.
    """

    hints: KeepHints
    kind: int
    """See ``ReuseRates.kind``."""
    num_before: int = 0
    """Number of earlier turns that it continues, each the successor of the one before."""
    tail: bytes | None = None
    """Last full block of the prompt, by which a next turn is recognized; None: there is no such
    block, or reuse is not observed."""
    blocks: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    """Free blocks in the order in which they were freed: ends of prefixes first."""
    freed: int = -1
    """Count of freed blocks when the turn ended; -1 while it runs."""
    age_bin: int = -1
    """Bin of its age; -1 while it runs, or if unobserved and without free blocks."""
    is_kept: bool = False
    """Whether its blocks are kept longer than others."""
    is_over: bool = False
    """Whether its reuse is not observed: it was reused or forgotten, or no request left it."""
    queue: OrderedDict[Turn, None] | None = None
    """Eviction queue that has the turn; None: the turn runs or has no free blocks."""


TurnQueue = OrderedDict[Turn, None]
"""Turns in the order of their eviction."""
