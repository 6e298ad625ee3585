"""One choice of a request in the engine, from receipt to end. Pure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from msgspec.structs import replace

from workers.requests.inspection import NamedArray
from workers.requests.request import (
    MAX_TIMES,
    FinishReason,
    PromptLogprobs,
    Request,
    SamplingParams,
    Timings,
    TokenLogprob,
    TokenOutput,
)


class OutputGrammar(Protocol):
    """State of a grammar after an output."""

    def advance(self, token: int) -> None:
        """Add an output token; called at commit only."""

    @property
    def is_complete(self) -> bool:
        """Whether no token can be added to the output."""


class SequenceStatus(Enum):
    """State of a sequence in the scheduler."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """Reason for the end of a sequence."""

    reason: FinishReason
    """The reason reported to the client."""
    stop_token_id: int | None = None
    """The stop token id that ended it; None for eos."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Reason for which a sequence failed."""

    message: str
    """Message for the client."""
    code: str
    param: str | None = None
    """The request's field that caused the failure, if any."""


NOT_FINITE = Failure("the model's output was not finite (NaN or infinity)", "internal_error")
"""The failure for model outputs with NaN or infinity."""


@dataclass(slots=True, eq=False)
class SequenceState:
    """One choice of a request: prompt, output so far, scheduling state, times.

    ``Scheduler`` changes tokens, blocks and status; the engine changes the rest.
    """

    request: Request
    """The request that this choice belongs to."""
    choice: int
    arrival: int
    """Order of receipt in this engine."""
    deadline: float
    """Monotonic time in seconds; infinity for none."""
    received: float = 0.0
    """Monotonic time of receipt in seconds."""
    output: list[int] = field(default_factory=list)
    """Output tokens so far, including those of earlier attempts."""
    grammar: OutputGrammar | None = None
    """Grammar state after ``output``; None without a grammar."""
    num_computed: int = 0
    """Number of positions from 0 on with keys and values in the cache."""
    blocks: list[int] = field(default_factory=list)
    """Block table. The sequence is one holder of each block."""
    state: int | None = None
    """Slot of its recurrent state after ``num_computed`` tokens; None without tokens, or if the
    model has no states."""
    branch: int = 0
    """Number of tokens in blocks cached at its admission, if the state after them was not."""
    latest_state: bytes | None = None
    """Hash of the block whose state was retained as its latest; the next one replaces it. None if
    there is none to replace: none was retained, or another sequence retained the same."""
    seat: int | None = None
    """Row of ``BlockTables`` for its blocks; None while it does not run."""
    status: SequenceStatus = SequenceStatus.WAITING
    first_choice: SequenceState | None = None
    """First open choice of the request, which shares its full prompt blocks; None for itself."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Chained hashes of its first full blocks; extended as needed."""
    num_cached_tokens: int | None = None
    """Number of prompt tokens that its first admission found in the prefix cache; None before."""
    prefills: list[float] = field(default_factory=list)
    """Monotonic times of the first dispatch of each prompt chunk, at most ``MAX_TIMES``."""
    preemptions: list[float] = field(default_factory=list)
    """Monotonic times of preemptions, at most ``MAX_TIMES``."""
    first_token: float | None = None
    """Monotonic time of the commit of its first new token."""
    is_idle: bool = False
    """Whether it is a beam with known candidates that waits for the other beams of its request."""
    scores_prompt: bool = field(init=False)
    """Whether it is choice 0 of a request with ``prompt_logprobs`` and no output at receipt."""
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    """Entries so far; None for the first prompt token."""
    prompt_length: int = field(init=False)
    key: int = field(init=False)
    """63-bit hash of (request, choice); with a position it identifies a row."""

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
        """Sort key: priority, output from another worker, arrival, choice; smaller is earlier."""
        is_new = not any(self.request.output_so_far)
        return (self.request.priority, is_new, self.arrival, self.choice)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of prompt and output."""
        return self.prompt_length + len(self.output)

    @property
    def num_missing(self) -> int:
        """Number of rows to run before the next token can be sampled."""
        return self.num_tokens - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether only its newest output token is missing from the cache."""
        return bool(self.output) and self.num_missing == 1

    @property
    def num_reusable(self) -> int:
        """Number of leading tokens that need no computation if they are cached.

        The newest token always does: the next one is sampled from its logits.
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
        """Record a dispatch of prompt rows, unless it has a new token."""
        if self.first_token is None and len(self.prefills) < MAX_TIMES:
            self.prefills.append(when)

    def note_preemption(self, when: float) -> None:
        if len(self.preemptions) < MAX_TIMES:
            self.preemptions.append(when)

    def make_output(
        self,
        now: float,
        ending: Ending | None,
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        class_logits: tuple[float, ...] = (),
        arrays: tuple[NamedArray, ...] = (),
    ) -> TokenOutput:
        """The output for the client after a commit; ``output`` already has the new tokens."""
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

    def make_error(self, failure: Failure, now: float) -> TokenOutput:
        """The last output of a failed sequence."""
        output = failed_output(self.request, self.choice, failure)
        return replace(output, index=len(self.output), timings=self.timings(now))

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


def failed_output(request: Request, choice: int, failure: Failure) -> TokenOutput:
    """The only output of a choice that failed."""
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
    """Number of leading prompt tokens that need no computation if they are cached."""
    if request.params.prompt_logprobs is not None:
        return 0
    if request.inspection is not None:
        return request.inspection.first_position(len(request.prompt))
    return len(request.prompt) - 1
