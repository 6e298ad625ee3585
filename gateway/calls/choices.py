"""State of the prompts and choices of a running call."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from gateway.core.call import GenerateCall
from gateway.core.delta import Finish, TokenText, Usage
from gateway.engines.submission import Submission
from gateway.text.answer_region import AnswerRegion
from gateway.text.detokenizer import ChoiceText, StopStringFinder, make_detokenizer
from gateway.text.tokenizer import Tokenizer
from workers.requests.inspection import NamedArray
from workers.requests.request import (
    FinishReason,
    PromptLogprobs,
    Request,
    Timings,
    TokenLogprob,
    TokenOutput,
)


@dataclass(frozen=True, slots=True)
class PromptResults:
    """Results of one prompt that are not generated tokens: arrays of the model, class logits."""

    arrays: tuple[NamedArray, ...] = ()
    class_logits: tuple[float, ...] = ()
    """Logits of a sequence classifier; empty for other calls and for inspections (``arrays``)."""


@dataclass(slots=True, eq=False)
class Choice:
    parent: weakref.ref[Prompt]
    """The prompt, to which only the call has references, so that all is freed when the call ends
    and not by the next full garbage collection."""
    number: int
    text: ChoiceText
    finish: Finish | None = None
    is_first: bool = True
    has_ended: bool = False
    last_token_s: float | None = None
    first_token_s: float | None = None
    first_timings: Timings | None = None

    @property
    def prompt(self) -> Prompt:
        prompt = self.parent()
        assert prompt is not None, "the call has its prompts until its end"
        return prompt

    @property
    def last_timings(self) -> Timings | None:
        """The engine's timings of the choice; None before the end of the choice."""
        return self.finish.timings if self.finish else None

    @property
    def token_ids(self) -> Sequence[int]:
        submission = self.prompt.submission
        return submission.outputs[self.number] if submission else ()

    def feed(self, output: TokenOutput, hidden_ends: Collection[int | None]) -> str | int | None:
        """Add tokens from the engine to the text of the choice.

        Returns the stop string or stop token that ended the text; None if the text goes on. If the
        last token is in ``hidden_ends``, its text is omitted.
        """
        last = len(output.token_ids) - 1
        for place, token_id in enumerate(output.token_ids):
            logprob = output.logprobs[place] if output.logprobs else None
            hidden = place == last and token_id in hidden_ends
            stopped = self.text.feed(token_id, logprob, hidden)
            if stopped is not None:
                return stopped
        return None

    def end(
        self,
        reason: FinishReason,
        stop_reason: str | int | None,
        timings: Timings | None = None,
        beam_score: float | None = None,
    ) -> None:
        """Mark the choice as finished. The arguments become the fields of ``Finish``."""
        usage = Usage(
            prompt_tokens=len(self.prompt.request.prompt),
            completion_tokens=self.text.num_tokens,
            cached_tokens=self.prompt.cached_tokens,
        )
        self.finish = Finish(
            reason=reason,
            stop_reason=stop_reason,
            usage=usage,
            timings=timings,
            beam_score=beam_score,
        )


@dataclass(slots=True, weakref_slot=True, eq=False)
class Prompt:
    """One prompt of a running call, its engine request and its choices."""

    index: int
    request: Request
    """The engine request of the prompt, as first submitted."""
    cached_tokens: int | None
    """Number of prompt tokens found in the prefix cache; None if prefix caching is disabled."""
    submission: Submission | None = None
    choices: list[Choice] = field(default_factory=list)
    scores: PromptLogprobs | None = None
    """Requested log-probabilities of the prompt, in the engine's form; None until they arrive."""
    logprobs: list[TokenLogprob | None] | None = None
    """Requested log-probabilities of the prompt, one entry per token; None until decoded."""
    echo: tuple[str, list[TokenText]] | None = None
    results: PromptResults = PromptResults()

    @property
    def waits_for_logprobs(self) -> bool:
        """Whether the client's output must wait for the prompt's log-probabilities."""
        return self.request.params.prompt_logprobs is not None and self.scores is None


def make_prompt(
    call: GenerateCall,
    index: int,
    request: Request,
    tokenizer: Tokenizer | None,
    caches_prefixes: bool,
) -> Prompt:
    """Make the state of a prompt of a call, with its choices, before its first output.

    Without a tokenizer, the choices have no text. ``caches_prefixes``: whether prefix caching is
    enabled.
    """
    prompt = Prompt(index, request, 0 if caches_prefixes else None)
    before = () if request.prompt_embeds is not None else request.prompt
    for number in range(request.n):
        detokenizer = None
        if tokenizer is not None:
            detokenizer = make_detokenizer(tokenizer, call.skip_special_tokens, before)
        text = ChoiceText(
            detokenizer,
            StopStringFinder(call.stop, call.include_stop_str_in_output),
            request.params.min_tokens,
            _answer_region(call),
            call.stop_token_ids if call.stops_in_answer else (),
        )
        prompt.choices.append(Choice(weakref.ref(prompt), number, text))
    return prompt


def _answer_region(call: GenerateCall) -> AnswerRegion | None:
    """Return the part of a choice's text in which stops apply; None for the whole text."""
    if not call.stops_in_answer:
        return None
    if call.thinking is not None:
        return AnswerRegion.after_thinking(call.thinking)
    return AnswerRegion.for_harmony(call.open_message)
