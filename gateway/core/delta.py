"""Pieces of an answer: text, tokens, ends and counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from workers.requests.request import FinishReason, Timings, TokenLogprob

_ENTRY_BYTES = 64
"""Of a token with its log-probability."""


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token of a choice, with its place in the text."""

    token_id: int
    text_offset: int
    """Characters of the text before it."""
    logprob: TokenLogprob | None = None
    """None where none was requested, and for the first token of an echoed prompt."""


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
    reason: FinishReason
    """STOP or LENGTH."""
    stop_reason: str | int | None
    """The stop string or stop token that ended it; None for eos and length."""
    usage: Usage
    timings: Timings | None
    """In its engine; None where a stop string ended it."""
    beam_score: float | None = None
    """Of an output of a beam search: its log-probability over its length to the power of
    ``length_penalty``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceDelta:
    """The next piece of one choice, or the whole choice: text that is final, with its tokens."""

    index: int
    """prompt * n + choice."""
    prompt_index: int
    is_first: bool
    text: str
    """New text; with ``echo`` the first begins with the prompt."""
    tokens: tuple[TokenText, ...]
    cached_tokens: int | None = None
    """Prompt tokens found in a prefix cache; None where prefixes are not cached."""
    echo_tokens: Sequence[TokenText] = ()
    """The prompt's tokens, in the first piece with ``echo``."""
    prompt_logprobs: Sequence[TokenLogprob | None] | None = None
    """One per prompt token, in the first piece, with ``prompt_logprobs``."""
    finish: Finish | None = None

    @property
    def size(self) -> int:
        """About the bytes of its JSON."""
        num_entries = len(self.tokens) + len(self.echo_tokens) + len(self.prompt_logprobs or ())
        return len(self.text) + _ENTRY_BYTES * num_entries
