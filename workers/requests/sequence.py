"""State of one choice of a request in the engine, from receipt to end. Pure."""

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
    """State of a grammar after the output so far."""

    def advance(self, token: int) -> None:
        """Add an output token. Called only when the step commits."""

    @property
    def is_complete(self) -> bool:
        """Whether the grammar permits no further token."""


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
    """The stop token id that ended the sequence; None if it ended for another reason."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a sequence failed."""

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
    """Number of the sequence in the order of receipt in this engine."""
    deadline: float
    """Deadline as monotonic time in seconds; infinity for none."""
    received: float = 0.0
    """Monotonic time of receipt in seconds."""
    output: list[int] = field(default_factory=list)
    """Output tokens so far, including those of earlier attempts."""
    grammar: OutputGrammar | None = None
    """Grammar state after ``output``; None without a grammar."""
    num_computed: int = 0
    """Number of leading tokens whose keys and values are in the cache."""
    blocks: list[int] = field(default_factory=list)
    """Its KV blocks in order (block table). The sequence is a holder of each block."""
    state: int | None = None
    """Slot of its recurrent state after ``num_computed`` tokens; None if that number is 0 or the
    model has no states."""
    branch: int = 0
    """Number of tokens cached at its admission if no state after them was cached; else 0."""
    latest_state: bytes | None = None
    """Hash of the block after which its latest recurrent state is stored; the next one replaces
    this state. None without one, or if another sequence has stored the same state."""
    seat: int | None = None
    """Index of its row in ``BlockTables``; None while it does not run."""
    status: SequenceStatus = SequenceStatus.WAITING
    first_choice: SequenceState | None = None
    """The request's first open choice, whose full prompt blocks it shares; None if it is this."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Chained hashes of its full blocks, from the first on; extended as needed."""
    num_cached_tokens: int | None = None
    """Number of prompt tokens in the prefix cache at its first admission; None before."""
    prefills: list[float] = field(default_factory=list)
    """Monotonic times of the first dispatch of each prompt chunk, at most ``MAX_TIMES``."""
    preemptions: list[float] = field(default_factory=list)
    """Monotonic times of preemptions, at most ``MAX_TIMES``."""
    first_token: float | None = None
    """Monotonic time of the commit of its first new token."""
    is_idle: bool = False
    """Whether it is a beam that waits until all beams of its request have been computed."""
    scores_prompt: bool = field(init=False)
    """Whether it computes ``prompt_logprobs``, as choice 0 of a request without earlier output."""
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    """Entries of the computed prompt tokens; None for the first token."""
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
        """Sort key, smaller is earlier: priority, output from another worker, arrival, choice."""
        is_new = not any(self.request.output_so_far)
        return (self.request.priority, is_new, self.arrival, self.choice)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of prompt and output."""
        return self.prompt_length + len(self.output)

    @property
    def num_missing(self) -> int:
        """Number of rows that must run before the next token can be sampled."""
        return self.num_tokens - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether only its newest output token is missing from the cache."""
        return bool(self.output) and self.num_missing == 1

    @property
    def num_reusable(self) -> int:
        """Number of leading tokens that need not be computed if they are cached.

        The newest token must be computed: the next one is sampled from its logits.
        """
        scores_now = self.scores_prompt and not self.output
        if scores_now or self.request.inspection is not None:
            return num_reusable(self.request)
        return self.num_tokens - 1

    def append(self, token: int) -> None:
        """Add a token to the output. Called only when the step commits."""
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
        """Record the time of a dispatch of prompt rows, unless the sequence has a new token."""
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
        """The output to send after a commit. ``self.output`` already contains ``tokens``."""
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
    """Number of leading prompt tokens that need not be computed if they are cached."""
    if request.params.prompt_logprobs is not None:
        return 0
    if request.inspection is not None:
        return request.inspection.first_position(len(request.prompt))
    return len(request.prompt) - 1
