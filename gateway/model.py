"""What the gateway knows of the served model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """Limits and identity of the served model, as the engines report them."""

    name: str
    """Name that clients use."""
    max_model_len: int
    """Tokens of prompt and output together."""
    vocab_size: int
    """Token ids are below this."""
    max_kv_tokens: int = 0
    """Tokens that fit an engine's whole KV pool; 0 is not known."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end the text."""
    dtype: str = ""
    """Compute type."""
    model_type: str = ""
    """Model family."""

    @property
    def context_tokens(self) -> int:
        """Tokens that one sequence can really have here."""
        limits = [limit for limit in (self.max_model_len, self.max_kv_tokens) if limit > 0]
        return min(limits, default=0)
