"""What the engine keeps of each choice beside the scheduler's state, and the outputs made of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from workers.findings import Findings
from workers.grammar import GrammarState
from workers.logit_rules import BadWords, SamplingRow, TokenCounts, needs_counts
from workers.request import MAX_NOTED, FinishReason, Timings, TokenLogprob, TokenOutput
from workers.sampling import DrawFailure, Drawn
from workers.sequence import Ending, Sequence


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a choice cannot go on."""

    message: str
    """For the client."""
    code: str
    """Machine-readable."""
    param: str | None = None
    """The request's field at fault, if one is."""


NOT_FINITE = Failure("the model's output was not finite (NaN or infinity)", "internal_error")
"""The model's fault."""
POISONOUS = Failure(
    "a third worker in a row was lost with this request, which was alone in its step",
    "poisonous_request",
)
"""The request's own fault, as far as can be told; see ``workers.isolation``."""


@dataclass(slots=True, eq=False)
class Track:
    """One choice of a request from receipt to end."""

    sequence: Sequence
    """The scheduler's side of it."""
    received: float
    """Monotonic seconds."""
    prefills: list[float] = field(default_factory=list)
    """Monotonic seconds of the first dispatch of each chunk of its prompt, the first few."""
    preemptions: list[float] = field(default_factory=list)
    """Monotonic seconds of each time that it gave way to others, the first few."""
    first_token: float | None = None
    """Monotonic seconds of the commit of its first new token."""
    counts: TokenCounts | None = None
    """Kept where penalties are used."""
    bad_words: BadWords | None = None
    """Kept where there are some."""
    grammar: GrammarState | None = None
    """What the output must follow; the sequence's own."""
    wants_prompt_logprobs: bool = False
    """Choice 0 of a request that asks for them and has none delivered."""
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    """Entries so far, the first prompt token's is None."""
    findings: Findings | None = None
    """What the request's inspection has found so far."""

    @classmethod
    def start(cls, sequence: Sequence, now: float, grammar: GrammarState | None = None) -> Track:
        """Begin to track a choice that was received ``now``."""
        params, output = sequence.params, sequence.output
        counts = None
        if needs_counts(params):
            counts = TokenCounts(params, sequence.request.prompt, output)
        bad_words = BadWords(params.bad_words) if params.bad_words else None
        return cls(
            sequence,
            now,
            counts=counts,
            bad_words=bad_words,
            grammar=grammar,
            wants_prompt_logprobs=sequence.scores_prompt,
        )

    def sampling_row(self, eos_token_ids: tuple[int, ...]) -> SamplingRow:
        """How its next token is drawn."""
        sequence, params = self.sequence, self.sequence.params
        index = len(sequence.output)
        banned = self._banned(index, eos_token_ids)
        return SamplingRow(params, sequence.choice, index, self.counts, banned, self.grammar)

    def _banned(self, index: int, eos_token_ids: tuple[int, ...]) -> tuple[int, ...]:
        sequence, params = self.sequence, self.sequence.params
        banned: tuple[int, ...] = ()
        if index < params.min_tokens:
            banned = (() if params.ignore_eos else eos_token_ids) + params.stop_token_ids
        if params.ignore_eos and self.grammar is not None:
            banned += eos_token_ids  # only a grammar that is complete may end it
        if self.bad_words is not None:
            banned += self.bad_words.banned(sequence.output)
        return banned

    def output(
        self,
        drawn: Drawn | None,
        ending: Ending | None,
        now: float,
        class_logits: tuple[float, ...] = (),
    ) -> TokenOutput:
        """The news after a commit: the drawn token, if any, is in the sequence's output already."""
        request = self.sequence.request
        is_first = self.first_token is None
        if is_first:
            self.first_token = now
        if drawn is not None and self.counts is not None:
            self.counts.add(drawn.token)
        has_scores = is_first and self.wants_prompt_logprobs
        return TokenOutput(
            request_id=request.request_id,
            attempt=request.attempt,
            choice=self.sequence.choice,
            index=len(self.sequence.output) - (drawn is not None),
            token_ids=() if drawn is None else (drawn.token,),
            logprobs=() if drawn is None or drawn.logprob is None else (drawn.logprob,),
            prompt_logprobs=tuple(self.prompt_logprobs) if has_scores else None,
            num_cached_tokens=self.sequence.num_cached_tokens if is_first else None,
            class_logits=class_logits,
            finish_reason=ending.reason if ending else None,
            stop_token_id=ending.stop_token_id if ending else None,
            timings=self._timings(now) if is_first or ending else None,
            arrays=self.findings.arrays() if ending and self.findings else (),
        )

    def draw_failure(self, drawn: Drawn) -> Failure:
        """What to tell of a draw that gave no token."""
        if drawn.failure is not DrawFailure.NONE_ALLOWED:
            return NOT_FINITE
        where = f"position {len(self.sequence.output)} of the output"
        params, error = self.sequence.params, None if self.grammar is None else self.grammar.error
        if error is not None and params.grammar is not None:
            field = params.grammar.field
            return Failure(
                f"{field} cannot be followed at {where}: {error}", "invalid_value", field
            )
        return Failure(f"no token is allowed at {where}", "invalid_value")

    def error(self, failure: Failure, now: float) -> TokenOutput:
        """The last output of a choice that failed."""
        request = self.sequence.request
        return TokenOutput(
            request_id=request.request_id,
            attempt=request.attempt,
            choice=self.sequence.choice,
            index=len(self.sequence.output),
            finish_reason=FinishReason.ERROR,
            error=failure.message,
            error_code=failure.code,
            error_param=failure.param,
            timings=self._timings(now),
        )

    def prefilled(self, when: float) -> None:
        """Rows of its prompt were dispatched."""
        if len(self.prefills) < MAX_NOTED:
            self.prefills.append(when)

    def preempted(self, when: float) -> None:
        """It gave way to others."""
        if len(self.preemptions) < MAX_NOTED:
            self.preemptions.append(when)

    def _timings(self, now: float) -> Timings:
        dispatch = self.prefills[0] if self.prefills else now
        token = now if self.first_token is None else self.first_token
        return Timings(
            first_dispatch_s=dispatch - self.received,
            first_token_s=token - self.received,
            finished_s=now - self.received,
            prefill_s=tuple(when - self.received for when in self.prefills),
            preempted_s=tuple(when - self.received for when in self.preemptions),
        )
