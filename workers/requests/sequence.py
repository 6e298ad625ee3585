"""One choice of a request as the engine serves it, from receipt to end. Pure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from msgspec.structs import replace

from workers.requests.inspection import NamedArray
from workers.requests.request import (
    MAX_NOTED,
    FinishReason,
    PromptLogprobs,
    Request,
    SamplingParams,
    Timings,
    TokenLogprob,
    TokenOutput,
)


class OutputGrammar(Protocol):
    """A grammar that an output must follow, in the state after that output."""

    def advance(self, token: int) -> None:
        """Add an output token; called at commit only."""

    @property
    def is_complete(self) -> bool:
        """Nothing can be added to the output."""


class SequenceStatus(Enum):
    """Where the scheduler has a sequence."""

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


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a sequence cannot go on."""

    message: str
    """For the client."""
    code: str
    param: str | None = None
    """The request's field at fault, if one is."""


NOT_FINITE = Failure("the model's output was not finite (NaN or infinity)", "internal_error")
"""The model's fault."""


@dataclass(slots=True, eq=False)
class SequenceState:
    """One choice of a request: prompt, output so far, its place in the scheduler, its times.

    ``Scheduler`` changes tokens, blocks and status; the engine changes the rest.
    """

    request: Request
    """The request of which this is a choice."""
    choice: int
    arrival: int
    """Order of receipt in this engine."""
    deadline: float
    """Monotonic seconds; infinity for none."""
    received: float = 0.0
    """Monotonic seconds."""
    output: list[int] = field(default_factory=list)
    """Tokens produced so far, those of earlier attempts included."""
    grammar: OutputGrammar | None = None
    """State after ``output``; None without a grammar."""
    num_computed: int = 0
    """Positions from 0 on that have keys and values in the cache."""
    blocks: list[int] = field(default_factory=list)
    """Block table; this sequence is one holder of each block."""
    state: int | None = None
    """Slot of its recurrent state after ``num_computed`` tokens; None: no tokens, or no such
    model."""
    branch: int = 0
    """Tokens in blocks that were known at its admission, if the state behind them was not."""
    latest_state: bytes | None = None
    """Hash of the block whose state was kept as this sequence's latest; its next one replaces it.
    None: there is none to replace, as none was kept, or another sequence had kept the same."""
    seat: int | None = None
    """Row of ``BlockTables`` with the same blocks; None while it does not run."""
    status: SequenceStatus = SequenceStatus.WAITING
    first_choice: SequenceState | None = None
    """First open choice of the request, which shares its full prompt blocks; None for itself."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Chained hashes of its first full blocks; extended as needed."""
    num_cached_tokens: int | None = None
    """Prompt tokens that its first admission found in the prefix cache; None before."""
    prefills: list[float] = field(default_factory=list)
    """Monotonic seconds of the first dispatch of each prompt chunk, ``MAX_NOTED`` at most."""
    preemptions: list[float] = field(default_factory=list)
    """Monotonic seconds of each preemption, ``MAX_NOTED`` at most."""
    first_token: float | None = None
    """Monotonic seconds of the commit of its first new token."""
    is_idle: bool = False
    """A beam that waits for the others of its request: what may follow it is known."""
    scores_prompt: bool = field(init=False)
    """Choice 0 of a request that asks for ``prompt_logprobs`` and has no output yet at receipt."""
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    """Entries so far, the first prompt token's is None."""
    prompt_length: int = field(init=False)
    key: int = field(init=False)
    """63-bit hash of (request, choice); with a position it names a row."""

    def __post_init__(self) -> None:
        self.prompt_length = len(self.request.prompt)
        name = f"{self.request.request_id}\0{self.choice}".encode()
        self.key = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1
        is_asked = self.params.prompt_logprobs is not None
        self.scores_prompt = is_asked and not self.choice and not self.output

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def order(self) -> tuple[int, bool, int, int]:
        """Smaller goes first: priority, output from another worker, arrival, choice."""
        is_new = not any(self.request.output_so_far)
        return (self.request.priority, is_new, self.arrival, self.choice)

    @property
    def num_tokens(self) -> int:
        """Tokens known: prompt and output."""
        return self.prompt_length + len(self.output)

    @property
    def num_missing(self) -> int:
        """Rows to run before the next token can be drawn."""
        return self.num_tokens - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Only its newest output token is missing from the cache."""
        return bool(self.output) and self.num_missing == 1

    @property
    def num_reusable(self) -> int:
        """Tokens from the first on that need not be computed if a cache knows them.

        The newest one always is: the next token is drawn from its logits.
        """
        scores_now = self.scores_prompt and not self.output
        if scores_now or self.request.inspection is not None:
            return num_reusable(self.request)
        return self.num_tokens - 1

    def append(self, token: int) -> None:
        """Add a token to the output; called at commit only."""
        self.output.append(token)
        self.is_idle = False
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

    def note_dispatch(self, when: float) -> None:
        """Rows of the prompt were dispatched, if there is no new token yet."""
        if self.first_token is None and len(self.prefills) < MAX_NOTED:
            self.prefills.append(when)

    def note_preemption(self, when: float) -> None:
        if len(self.preemptions) < MAX_NOTED:
            self.preemptions.append(when)

    def take_output(
        self,
        now: float,
        ending: Ending | None,
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        class_logits: tuple[float, ...] = (),
        arrays: tuple[NamedArray, ...] = (),
    ) -> TokenOutput:
        """What the client gets after a commit; ``output`` has the new tokens already."""
        is_first = self.first_token is None
        if is_first:
            self.first_token = now
        has_scores = is_first and self.scores_prompt
        return TokenOutput(
            request_id=self.request.request_id,
            attempt=self.request.attempt,
            choice=self.choice,
            index=len(self.output) - len(tokens),
            token_ids=tokens,
            logprobs=logprobs,
            prompt_logprobs=PromptLogprobs.of(self.prompt_logprobs) if has_scores else None,
            num_cached_tokens=self.num_cached_tokens if is_first else None,
            class_logits=class_logits,
            finish_reason=ending.reason if ending else None,
            stop_token_id=ending.stop_token_id if ending else None,
            timings=self.timings(now) if is_first or ending else None,
            arrays=arrays,
        )

    def error(self, failure: Failure, now: float) -> TokenOutput:
        """The last output of a sequence that failed."""
        found = failed(self.request, self.choice, failure)
        return replace(found, index=len(self.output), timings=self.timings(now))

    def timings(self, now: float) -> Timings:
        """Its times so far."""
        dispatch = self.prefills[0] if self.prefills else now
        token = now if self.first_token is None else self.first_token
        return Timings(
            first_dispatch_s=dispatch - self.received,
            first_token_s=token - self.received,
            finished_s=now - self.received,
            prefill_s=tuple(when - self.received for when in self.prefills),
            preempted_s=tuple(when - self.received for when in self.preemptions),
        )


def failed(request: Request, choice: int, failure: Failure) -> TokenOutput:
    """The only output of a choice."""
    return TokenOutput(
        request_id=request.request_id,
        attempt=request.attempt,
        choice=choice,
        index=0,
        finish_reason=FinishReason.ERROR,
        error=failure.message,
        error_code=failure.code,
        error_param=failure.param,
    )


def num_reusable(request: Request) -> int:
    """Prompt tokens from the first on that need not be computed if a cache knows them."""
    if request.params.prompt_logprobs is not None:
        return 0
    if request.inspection is not None:
        return request.inspection.first_position(len(request.prompt))
    return len(request.prompt) - 1
