"""A request on its road to the engine, and the states of that road.

    RECEIVED ─▶ WAITS_FOR_KV ─▶ COMPILES_GRAMMAR ─▶ QUEUED ⇄ WAITS_FOR_KV
        └──────────────┴────────────────┴─────────▶ REFUSED

A request waits for KV blocks before it is queued only where they are fetched ahead of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from msgspec import structs

from cluster.core.states import Transitions, next_state
from workers.requests.block_hash import BlockHash
from workers.requests.request import Request


class IntakeState(Enum):
    """Where a request is. The value is for people."""

    RECEIVED = "received"
    WAITS_FOR_KV = "waits for KV blocks"
    COMPILES_GRAMMAR = "compiles its grammar"
    QUEUED = "queued"
    """The engine has it, and may admit it."""
    REFUSED = "refused"


_NEXT: Transitions[IntakeState] = {
    IntakeState.RECEIVED: {
        IntakeState.WAITS_FOR_KV,
        IntakeState.COMPILES_GRAMMAR,
        IntakeState.QUEUED,
        IntakeState.REFUSED,
    },
    IntakeState.WAITS_FOR_KV: {
        IntakeState.WAITS_FOR_KV,
        IntakeState.COMPILES_GRAMMAR,
        IntakeState.QUEUED,
        IntakeState.REFUSED,
    },
    IntakeState.COMPILES_GRAMMAR: {IntakeState.QUEUED, IntakeState.REFUSED},
    IntakeState.QUEUED: {IntakeState.WAITS_FOR_KV},
    IntakeState.REFUSED: set(),
}


@dataclass(slots=True, eq=False)
class IntakeRequest:
    """A request that the engine does not have yet, or lets wait for KV blocks."""

    gateway: str
    request: Request
    received: float
    """Monotonic seconds at which the stream delivered it."""
    hashes: tuple[BlockHash, ...] = ()
    """Of the full KV blocks of its prompt, in order; none where requests share no blocks."""
    state: IntakeState = IntakeState.RECEIVED
    is_in_engine: bool = False
    """Whether the engine has the request already."""
    kv_deadline_s: float = math.inf
    """Time on the clock at which it stops to wait for KV blocks, wherever they are; set at the
    begin of its first wait."""
    has_joined: bool = False
    """It waits for blocks that a source brings for another request; written by the source."""

    @property
    def name(self) -> str:
        """The id of the request."""
        return self.request.request_id

    def enter(self, state: IntakeState) -> None:
        """Change the state. Raises ``StateError`` where it cannot follow."""
        self.state = next_state(self.state, state, _NEXT)

    def close(self, choices: Iterable[int]) -> None:
        """Do not run these choices."""
        closed = tuple(sorted({*self.request.closed_choices, *choices}))
        self.request = structs.replace(self.request, closed_choices=closed)
