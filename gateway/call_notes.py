"""What is known of a call when it has ended, for its trace. Times are ``time.monotonic``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.call import GenerateCall
from gateway.delta import Usage
from workers.request import FinishReason, Timings


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceNotes:
    """One choice."""

    first_token_s: float | None
    """When its first token came; None: it never did."""
    last_token_s: float | None
    """When its last one came."""
    first_timings: Timings | None
    """What the engine told with its first token."""
    last_timings: Timings | None
    """What it told with the end."""
    finish_reason: FinishReason | None
    """Why it ended; None: it did not, or with an error."""
    token_ids: Sequence[int]
    """Output."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptNotes:
    """One prompt, and the engine's request for it."""

    worker: str
    """Who had it last; empty: nobody."""
    cached_tokens: int | None
    """Tokens of it that were cached, where prefixes are."""
    replays_s: Sequence[float]
    """When it went to another worker."""
    choices: Sequence[ChoiceNotes]
    """All of it, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CallNotes:
    """A whole call."""

    call: GenerateCall
    """What was asked for."""
    call_id: str
    """Its name."""
    started_s: float
    """It came."""
    admitted_s: float
    """It had its tokens, and its place in the queue."""
    heard_s: float
    """The last news of the engines came; 0: none did."""
    closed_s: float
    """It was over."""
    usage: Usage
    """Tokens."""
    makes_text: bool
    """Its tokens were made into text."""
    prompts: Sequence[PromptNotes]
    """In order."""
