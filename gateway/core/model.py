"""Facts about the served model."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from workers.requests.inspection import ModelShape
from workers.requests.wire import EngineHello


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """Limits and identity of the served model, as the engines report them."""

    name: str
    max_model_len: int
    """Maximum number of tokens of prompt and output together."""
    vocab_size: int
    """Number of token ids."""
    max_kv_tokens: int = 0
    """Number of tokens that fit in the whole KV pool of an engine; 0 if unknown."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end the text."""
    dtype: str = ""
    model_type: str = ""
    shape: ModelShape | None = None
    """Dimensions that determine the array sizes of inspections."""
    labels: tuple[str, ...] = ()
    """Classes of a sequence classifier."""
    pad_token_id: int | None = None
    """Token that a classifier ignores at the end of a prompt."""
    problem_type: str = ""
    """``problem_type`` of a classifier; empty if the checkpoint has none."""

    @property
    def context_tokens(self) -> int:
        """Context limit in tokens: the smaller of the model's limit and the KV pool."""
        limits = [limit for limit in (self.max_model_len, self.max_kv_tokens) if limit > 0]
        return min(limits, default=0)


def model_facts(name: str, hello: EngineHello) -> ModelFacts:
    """Collect the facts that an engine reports."""
    shape = ModelShape(num_labels=len(hello.labels), **_common(ModelShape, hello))
    return ModelFacts(name=name, shape=shape, **_common(ModelFacts, hello))


def _common(kind: type[Any], hello: EngineHello) -> dict[str, Any]:
    """Return the values of ``hello`` that the dataclass ``kind`` has as fields, by name."""
    names = (one.name for one in fields(kind))
    return {name: getattr(hello, name) for name in names if hasattr(hello, name)}
