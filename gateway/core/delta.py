"""Pieces of output: text, tokens, finish and usage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from workers.requests.request import FinishReason, Timings, TokenLogprob

_ENTRY_BYTES = 64
"""Approximate number of JSON bytes of a token with its log-probability."""


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token of a choice, with its position in the text."""

    token_id: int
    text_offset: int
    """Number of characters of the text before the token."""
    logprob: TokenLogprob | None = None
    """Log-probability; None if not requested, and for the first token of an echoed prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Token counts of a call or of one choice."""

    prompt_tokens: int
    """Number of tokens of all prompts, each prompt counted once."""
    completion_tokens: int
    """Number of new tokens, up to the end of a stop string."""
    cached_tokens: int | None = None
    """Prompt tokens found in a prefix cache; None where prefixes are not cached."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finish:
    reason: FinishReason
    """``STOP`` or ``LENGTH``."""
    stop_reason: str | int | None
    """Stop string or stop token that ended the choice; None for eos and length."""
    usage: Usage
    timings: Timings | None
    """Times by the engine's clock; None if the gateway ended the choice at a stop."""
    beam_score: float | None = None
    """Score of a beam: log-probability of the output / its length to the power of
    ``length_penalty``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceDelta:
    """The next piece of a choice, or a whole choice: text that will not change, and its tokens."""

    index: int
    """Index of the choice in the response: prompt * n + choice."""
    prompt_index: int
    is_first: bool
    text: str
    """New text. With ``echo``, the first piece begins with the prompt."""
    tokens: tuple[TokenText, ...]
    cached_tokens: int | None = None
    """Prompt tokens found in a prefix cache; None where prefixes are not cached."""
    echo_tokens: Sequence[TokenText] = ()
    """With ``echo``, the prompt's tokens in the first piece."""
    prompt_logprobs: Sequence[TokenLogprob | None] | None = None
    """With ``prompt_logprobs``, one entry per prompt token in the first piece."""
    finish: Finish | None = None

    @property
    def size(self) -> int:
        """Approximate number of bytes of the piece in JSON."""
        num_entries = len(self.tokens) + len(self.echo_tokens) + len(self.prompt_logprobs or ())
        return len(self.text) + _ENTRY_BYTES * num_entries
