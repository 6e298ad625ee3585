"""What the gateway knows of the served model."""

from __future__ import annotations

from dataclasses import dataclass

from workers.inspection import ModelShape


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
    shape: ModelShape | None = None
    """What the sizes of inspections depend on."""
    labels: tuple[str, ...] = ()
    """Classes of a sequence classifier."""
    pad_token_id: int | None = None
    """Token that a classifier does not take for the last one."""
    problem_type: str = ""
    """Of a classifier; empty where the checkpoint says nothing."""

    @property
    def context_tokens(self) -> int:
        """Tokens that one sequence can really have here."""
        limits = [limit for limit in (self.max_model_len, self.max_kv_tokens) if limit > 0]
        return min(limits, default=0)
