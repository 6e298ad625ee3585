"""One choice of a request as scheduler and engine see it. Pure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from workers.request import FinishReason, Request, SamplingParams


class OutputGrammar(Protocol):
    """What the output must follow, as far as it has got."""

    def advance(self, token: int) -> None:
        """Add an output token; called at commit only."""

    @property
    def is_complete(self) -> bool:
        """Nothing can be added to the output any more."""


class SequenceState(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """Why a sequence ended."""

    reason: FinishReason
    """As the client sees it."""
    stop_token_id: int | None = None
    """The stop token id that ended it, not for eos."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a request. ``Scheduler`` owns the state; the engine reads it."""

    request: Request
    """Where it comes from."""
    choice: int
    """Which choice."""
    arrival: int
    """Order of receipt in this engine."""
    deadline: float
    """Monotonic seconds; infinity for none."""
    output: list[int] = field(default_factory=list)
    """Tokens produced so far, those of earlier attempts included."""
    grammar: OutputGrammar | None = None
    """State after ``output``; None where it is free."""
    num_computed: int = 0
    """Positions from 0 on whose keys and values are in the cache."""
    blocks: list[int] = field(default_factory=list)
    """Block table; this sequence is one holder of each block."""
    state: SequenceState = SequenceState.WAITING
    """Place in the scheduler."""
    leader: Sequence | None = None
    """First open choice of the same request, whose full prompt blocks are shared; None for it."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Chained hashes of its first full blocks, as far as they were needed."""
    num_cached_tokens: int | None = None
    """Prompt tokens that its first admission found in the prefix cache; None before."""
    key: int = 0
    """63-bit hash of (request, choice); with a position it names a row."""

    def __post_init__(self) -> None:
        name = f"{self.request.request_id}\0{self.choice}".encode()
        self.key = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1

    @property
    def params(self) -> SamplingParams:
        """Sampling parameters."""
        return self.request.params

    @property
    def order(self) -> tuple[int, int, int]:
        """Smaller goes first: priority, arrival, choice."""
        return (self.request.priority, self.arrival, self.choice)

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def num_tokens(self) -> int:
        """Tokens known: prompt and output."""
        return len(self.request.prompt) + len(self.output)

    @property
    def num_missing(self) -> int:
        """Rows to run before the next token can be drawn."""
        return self.num_tokens - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Only its newest output token is missing from the cache."""
        return bool(self.output) and self.num_missing == 1

    @property
    def scores_prompt(self) -> bool:
        """Every prompt token is computed, for its log-probability."""
        return self.params.prompt_logprobs is not None and not self.choice and not self.output

    @property
    def num_reusable(self) -> int:
        """Tokens from the first on that need not be computed if a cache knows them.

        The newest one always is: the next token is drawn from its logits.
        """
        if self.scores_prompt or self.request.inspection is not None:
            return num_reusable(self.request)
        return self.num_tokens - 1

    def append(self, token: int) -> None:
        """Add a token to the output; called at commit only."""
        self.output.append(token)
        if self.grammar is not None:
            self.grammar.advance(token)

    def tokens(self, first: int, last: int) -> tuple[int, ...] | list[int]:
        """Token ids at positions first .. last - 1."""
        length = self.prompt_length
        if last <= length:
            return self.request.prompt[first:last]
        if first >= length:
            return self.output[first - length : last - length]
        return (*self.request.prompt[first:], *self.output[: last - length])


def num_reusable(request: Request) -> int:
    """Prompt tokens from the first on that need not be computed if a cache knows them."""
    if request.params.prompt_logprobs is not None:
        return 0
    if request.inspection is not None:
        return request.inspection.first_position(len(request.prompt))
    return len(request.prompt) - 1
