"""What the engine keeps of each choice beside the scheduler's state, and the outputs made of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from workers.request import FinishReason, Timings, TokenLogprob, TokenOutput
from workers.sampling import Drawn, SamplingRow, TokenCounts, needs_counts
from workers.sequence import Ending, Sequence


@dataclass(slots=True, eq=False)
class Track:
    """One choice of a request from receipt to end."""

    sequence: Sequence
    """The scheduler's side of it."""
    received: float
    """Monotonic seconds."""
    first_dispatch: float | None = None
    """Monotonic seconds of the first dispatch of one of its rows."""
    first_token: float | None = None
    """Monotonic seconds of the commit of its first new token."""
    counts: TokenCounts | None = None
    """Kept where penalties are used."""
    wants_prompt_logprobs: bool = False
    """Choice 0 of a request that asks for them and has none delivered."""
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    """Entries so far, the first prompt token's is None."""

    @classmethod
    def start(cls, sequence: Sequence, now: float) -> Track:
        """Begin to track a choice that was received ``now``."""
        params, output = sequence.params, sequence.output
        counts = None
        if needs_counts(params):
            counts = TokenCounts(params, sequence.request.prompt, output)
        wants_scores = params.prompt_logprobs is not None and not sequence.choice and not output
        return cls(sequence, now, counts=counts, wants_prompt_logprobs=wants_scores)

    def sampling_row(self, eos_token_ids: tuple[int, ...]) -> SamplingRow:
        """How its next token is drawn."""
        params, index = self.sequence.params, len(self.sequence.output)
        ending: tuple[int, ...] = ()
        if index < params.min_tokens:
            ending = (() if params.ignore_eos else eos_token_ids) + params.stop_token_ids
        return SamplingRow(params, self.sequence.choice, index, self.counts, ending)

    def output(self, drawn: Drawn | None, ending: Ending | None, now: float) -> TokenOutput:
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
            finish_reason=ending.reason if ending else None,
            stop_token_id=ending.stop_token_id if ending else None,
            timings=self._timings(now) if ending else None,
        )

    def error(self, message: str, code: str, now: float) -> TokenOutput:
        """The last output of a choice that failed."""
        request = self.sequence.request
        return TokenOutput(
            request_id=request.request_id,
            attempt=request.attempt,
            choice=self.sequence.choice,
            index=len(self.sequence.output),
            finish_reason=FinishReason.ERROR,
            error=message,
            error_code=code,
            timings=self._timings(now),
        )

    def _timings(self, now: float) -> Timings:
        dispatch = now if self.first_dispatch is None else self.first_dispatch
        token = now if self.first_token is None else self.first_token
        return Timings(
            first_dispatch_s=dispatch - self.received,
            first_token_s=token - self.received,
            finished_s=now - self.received,
        )
