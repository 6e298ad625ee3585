"""What all types of HTTP bodies are made of."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
"""JSON knows one kind of number: 5.0 is 5."""
Item = TypeVar("Item")


class _FirstError(FailFast):
    """``FailFast`` that can be in a union of types."""

    def __hash__(self) -> int:
        return hash(self.fail_fast)


Items = Annotated[list[Item], _FirstError()]
"""A list of which the first wrong item ends the check: a body has room for millions."""


class StrictBody(BaseModel):
    """A JSON object: ``"5"`` is not a number, and unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
