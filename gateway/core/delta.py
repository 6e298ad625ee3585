"""Pieces of output: text, tokens, finish and usage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from workers.requests.request import FinishReason, Timings, TokenLogprob

_ENTRY_BYTES = 64
"""JSON bytes of a token with its log-probability, approximately."""


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token of a choice, with its position in the text."""

    token_id: int
    text_offset: int
    """Number of characters of the text before it."""
    logprob: TokenLogprob | None = None
    """None if not requested, and for the first token of an echoed prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Token counts of a call or of one choice."""

    prompt_tokens: int
    """Tokens of all prompts, each counted once."""
    completion_tokens: int
    """New tokens, up to the end of a stop string."""
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
    """Times in its engine; None if a stop string ended it."""
    beam_score: float | None = None
    """Score of an output of a beam search: its log-probability divided by its length to the power
    of ``length_penalty``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceDelta:
    """The next piece of one choice, or a whole choice: final text with its tokens."""

    index: int
    """prompt * n + choice."""
    prompt_index: int
    is_first: bool
    text: str
    """New text; with ``echo`` the first piece begins with the prompt."""
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
        """Approximate number of bytes of its JSON."""
        num_entries = len(self.tokens) + len(self.echo_tokens) + len(self.prompt_logprobs or ())
        return len(self.text) + _ENTRY_BYTES * num_entries
