"""State of one choice of a request in the engine, from the receipt to its end. Pure."""

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
    """State of a sequence's grammar after the output so far."""

    def advance(self, token: int) -> None:
        """Advance the state by an output token. Called only when the token's step commits."""

    @property
    def is_complete(self) -> bool:
        """Whether the output is complete: the grammar permits no further token."""


class SequenceStatus(Enum):
    """State of a sequence in the scheduler."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """Reason for the end of a sequence."""

    reason: FinishReason
    """Reason that is reported to the client."""
    stop_token_id: int | None = None
    """Id of the stop token that ended the sequence; None if it ended for another reason."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Error of a sequence that failed, for the client."""

    message: str
    """Text of the error for the client."""
    code: str
    param: str | None = None
    """Field of the request that caused the failure; None if no field did."""


NOT_FINITE = Failure("the model's output was not finite (NaN or infinity)", "internal_error")
"""Error of a sequence for which the model has computed NaN or infinity."""


@dataclass(slots=True, eq=False)
class SequenceState:
    """A sequence: one choice of a request with its output so far, scheduling state and times.

    ``Scheduler`` changes blocks, status and tokens, except tokens of beams.
    """

    request: Request
    """Request that the sequence is a choice of."""
    choice: int
    arrival: int
    """Number of the request in the order of receipt in this engine."""
    deadline: float
    """Deadline of the request as monotonic time in seconds; infinity for none."""
    received: float = 0.0
    """Monotonic time in seconds at which the request was received."""
    output: list[int] = field(default_factory=list)
    """Ids of the output tokens so far, including tokens of earlier attempts."""
    grammar: OutputGrammar | None = None
    """Grammar state after ``output``; None without a grammar."""
    num_computed: int = 0
    """Number of leading tokens whose keys and values are in the KV cache."""
    blocks: list[int] = field(default_factory=list)
    """KV blocks of the sequence in order (block table). The sequence has a reference to each."""
    state: int | None = None
    """Slot of the sequence's recurrent state after ``num_computed`` tokens; None if no token is
    computed or the model has no recurrent states."""
    branch: int = 0
    """Number of tokens whose KV blocks were cached at the admission, if the recurrent state after
    them was not; else 0. The sequence stores the state after these tokens."""
    latest_state: bytes | None = None
    """Hash of the block after which the sequence's latest recurrent state is stored; the next
    stored state replaces this state. None without such a state, or if another sequence has stored
    the state."""
    max_blocks: int = 0
    """Maximum number of KV blocks of the sequence until its end; 0 before the first admission."""
    seat: int | None = None
    """Index of the sequence's row in ``BlockTables``; None while the sequence does not run."""
    status: SequenceStatus = SequenceStatus.WAITING
    first_choice: SequenceState | None = None
    """First open choice of the request, which computes the full prompt blocks that all choices
    share; None for this first choice itself."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Chained hashes of the sequence's full blocks, from the first block on; extended as needed."""
    num_cached_tokens: int | None = None
    """Number of prompt tokens in the prefix cache at the first admission; None before."""
    prefills: list[float] = field(default_factory=list)
    """Monotonic times of the first dispatch of each prompt chunk, at most ``MAX_TIMES``."""
    preemptions: list[float] = field(default_factory=list)
    """Monotonic times of the sequence's preemptions, at most ``MAX_TIMES``."""
    first_token: float | None = None
    """Monotonic time of the commit of the first new token; None before."""
    is_idle: bool = False
    """Whether the sequence is a beam that waits until all beams of its request were computed."""
    scores_prompt: bool = field(init=False)
    """Whether the sequence computes ``prompt_logprobs``: it is choice 0, without earlier output."""
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    """Log-probabilities of the prompt tokens scored so far; None for the first token."""
    prompt_length: int = field(init=False)
    order: tuple[int, bool, int, int] = field(init=False)
    """Sort key of sequences that wait or run; smaller is earlier. It is (priority, whether the
    request came without earlier output, arrival, choice)."""
    key: int = field(init=False)
    """63-bit hash of (request, choice); with a position, the key identifies a row."""

    def __post_init__(self) -> None:
        self.prompt_length = len(self.request.prompt)
        is_new = not any(self.request.output_so_far)
        self.order = (self.request.priority, is_new, self.arrival, self.choice)
        name = f"{self.request.request_id}\0{self.choice}".encode()
        self.key = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1
        is_asked = self.params.prompt_logprobs is not None
        self.scores_prompt = is_asked and not self.choice and not self.output

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def num_tokens(self) -> int:
        """Number of tokens of prompt and output together."""
        return self.prompt_length + len(self.output)

    @property
    def num_missing(self) -> int:
        """Number of rows that must run before the next token can be sampled."""
        return self.prompt_length + len(self.output) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether only the newest output token is missing from the KV cache."""
        if not self.output:  # not ``num_missing``: each step asks every sequence
            return False
        return self.prompt_length + len(self.output) - self.num_computed == 1

    @property
    def num_reusable(self) -> int:
        """Number of leading tokens that need not be computed if their KV blocks are cached.

        The newest token must be computed: the next token is sampled from its logits. Earlier tokens
        must be computed if the request asks for their logprobs or internal values.
        """
        scores_now = self.scores_prompt and not self.output
        if scores_now or self.request.inspection is not None:
            return num_reusable(self.request)
        return self.num_tokens - 1

    def append(self, token: int) -> None:
        """Add a token to the output. Called only when the token's step commits."""
        self.output.append(token)
        self.is_idle = False
        if self.grammar is not None:
            self.grammar.advance(token)

    def tokens(self, first: int, last: int) -> tuple[int, ...] | list[int]:
        """Return the token ids of prompt and output at positions first .. last - 1."""
        length = self.prompt_length
        if last <= length:
            return self.request.prompt[first:last]
        if first >= length:
            return self.output[first - length : last - length]
        return (*self.request.prompt[first:], *self.output[: last - length])

    def note_dispatch(self, when: float) -> None:
        """Record the monotonic time ``when`` of a dispatch of the sequence's prompt rows.

        No effect after the first new token.
        """
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
        """Make the output to send after a commit.

        ``tokens``: new tokens, which ``self.output`` already contains. ``ending``: None if the
        sequence continues.
        """
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
        """Make the last output of a failed sequence, with the error. ``now``: monotonic time."""
        output = failed_output(self.request, self.choice, failure)
        return replace(output, index=len(self.output), timings=self.timings(now))

    def timings(self, now: float) -> Timings:
        """Return the times of the sequence so far. ``now``: monotonic time of its latest output."""
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
    """Make the only output of a choice that has failed before any output, with the error."""
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
    """Return the number of leading prompt tokens that need not be computed if they are cached.

    0 if logprobs of the prompt are requested.
    """
    if request.params.prompt_logprobs is not None:
        return 0
    if request.inspection is not None:
        return request.inspection.first_position(len(request.prompt))
    return len(request.prompt) - 1
