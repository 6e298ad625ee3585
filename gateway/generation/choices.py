"""The state of a running call's prompts and choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.core.delta import Finish, TokenText
from gateway.engines.submission import Submission
from gateway.text.detokenizer import ChoiceText
from workers.requests.inspection import NamedArray
from workers.requests.request import PromptLogprobs, Request, Timings, TokenLogprob


@dataclass(frozen=True, slots=True)
class Found:
    """Results of one prompt beside tokens."""

    arrays: tuple[NamedArray, ...] = ()
    class_logits: tuple[float, ...] = ()
    """Logits of a sequence classifier, without an inspection."""


@dataclass(slots=True, eq=False)
class Choice:
    prompt: Prompt
    number: int
    text: ChoiceText
    finish: Finish | None = None
    is_first: bool = True
    has_ended: bool = False
    last_token_s: float | None = None
    first_token_s: float | None = None
    first_timings: Timings | None = None

    @property
    def last_timings(self) -> Timings | None:
        """The engine's times at the choice's end; None before."""
        return self.finish.timings if self.finish else None

    @property
    def token_ids(self) -> Sequence[int]:
        submission = self.prompt.submission
        return submission.outputs[self.number] if submission else ()


@dataclass(slots=True, eq=False)
class Prompt:
    """One prompt of a running call, with its engine request."""

    index: int
    request: Request
    """As it was first submitted."""
    cached_tokens: int | None
    """None where prefixes are not cached."""
    submission: Submission | None = None
    choices: list[Choice] = field(default_factory=list)
    scores: PromptLogprobs | None = None
    """As the engine sent them, where asked for."""
    logprobs: list[TokenLogprob | None] | None = None
    """``scores``, decoded."""
    echo: tuple[str, list[TokenText]] | None = None
    found: Found = Found()

    @property
    def waits_for_logprobs(self) -> bool:
        """Nothing is sent before the engine has reported the log-probabilities of the prompt."""
        return self.request.params.prompt_logprobs is not None and self.scores is None
