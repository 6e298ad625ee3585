"""What a codec tells the client: pieces of text, ends, and counts."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.text import TokenText
from workers.request import FinishReason, Timings, TokenLogprob


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Tokens of a call or of one choice."""

    prompt_tokens: int
    """Each prompt once."""
    completion_tokens: int
    """Those that count: up to the end of a stop string, not beyond."""
    cached_tokens: int | None = None
    """Prompt tokens found in a prefix cache; None where prefixes are not cached."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finish:
    """How a choice ended."""

    reason: FinishReason
    """STOP or LENGTH."""
    stop_reason: str | int | None
    """The stop string or stop token that ended it; None for eos and length."""
    usage: Usage
    """Of this choice."""
    timings: Timings | None
    """In its engine; None where a stop string ended it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceDelta:
    """News of one choice: text that is certain, with the tokens that came with it."""

    index: int
    """prompt * n + choice."""
    prompt_index: int
    """Which prompt."""
    is_first: bool
    """The choice's first news."""
    text: str
    """New text; with ``echo`` the first begins with the prompt."""
    tokens: tuple[TokenText, ...]
    """New tokens."""
    cached_tokens: int | None = None
    """Prompt tokens found in a prefix cache; None where prefixes are not cached."""
    echo_tokens: tuple[TokenText, ...] = ()
    """The prompt's tokens, in the first news with ``echo``."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """One a prompt token, in the first news where asked for (not only for ``echo``)."""
    finish: Finish | None = None
    """In the last news."""
