"""A request before it enters the engine, and its states.

    RECEIVED ─▶ WAITS_FOR_KV ─▶ COMPILES_GRAMMAR ─▶ QUEUED ⇄ WAITS_FOR_KV
        └──────────────┴────────────────┴─────────▶ REFUSED

Before it is queued, a request waits only for KV blocks that are being prefetched.
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
    """State of a request. The values are texts for logs and errors."""

    RECEIVED = "received"
    WAITS_FOR_KV = "waits for KV blocks"
    COMPILES_GRAMMAR = "compiles its grammar"
    QUEUED = "queued"
    """The engine has the request and may admit it."""
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
    """A request that has not entered the engine, or waits in the engine's queue for KV blocks."""

    gateway: str
    request: Request
    received: float
    """Monotonic time in seconds at which the request arrived or, if it is in the engine's queue,
    began to wait for KV blocks."""
    hashes: tuple[BlockHash, ...] = ()
    """Hashes of the full KV blocks of the prompt, in order; empty if blocks are not shared."""
    state: IntakeState = IntakeState.RECEIVED
    is_in_engine: bool = False
    """Whether the request waits in the engine's queue."""
    kv_deadline_s: float = math.inf
    """Time on the clock at which the request stops waiting for KV blocks, whatever their source.
    Set at the start of its first wait."""
    has_joined: bool = False
    """Whether the request waits for a restore that another one started; set by ``KvRestores``."""

    @property
    def name(self) -> str:
        """The id of the request."""
        return self.request.request_id

    def enter(self, state: IntakeState) -> None:
        """Change the state. Raises ``IllegalTransitionError``."""
        self.state = next_state(self.state, state, _NEXT)

    def close(self, choices: Iterable[int]) -> None:
        """Mark these choices as closed (aborted), so that the engine does not run them."""
        closed = tuple(sorted({*self.request.closed_choices, *choices}))
        self.request = structs.replace(self.request, closed_choices=closed)
