"""What the gateway knows of the served model."""

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
    """Tokens of prompt and output together."""
    vocab_size: int
    """Token ids are below this."""
    max_kv_tokens: int = 0
    """Tokens that fit an engine's whole KV pool; 0 is not known."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end the text."""
    dtype: str = ""
    model_type: str = ""
    shape: ModelShape | None = None
    """What the sizes of inspections depend on."""
    labels: tuple[str, ...] = ()
    """Classes of a sequence classifier."""
    pad_token_id: int | None = None
    """Token that a classifier does not take for the last one."""
    problem_type: str = ""
    """A classifier's kind of labels; empty where the checkpoint names none."""

    @property
    def context_tokens(self) -> int:
        """Context limit in force: the model's, or what the KV cache holds."""
        limits = [limit for limit in (self.max_model_len, self.max_kv_tokens) if limit > 0]
        return min(limits, default=0)


def model_facts(name: str, hello: EngineHello) -> ModelFacts:
    """What an engine reports of its model."""
    shape = ModelShape(num_labels=len(hello.labels), **_common(ModelShape, hello))
    return ModelFacts(name=name, shape=shape, **_common(ModelFacts, hello))


def _common(kind: type[Any], hello: EngineHello) -> dict[str, Any]:
    """The fields of a dataclass that a hello has by the same name."""
    names = (one.name for one in fields(kind))
    return {name: getattr(hello, name) for name in names if hasattr(hello, name)}
