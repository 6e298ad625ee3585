"""What all types of HTTP bodies are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    ValidationError,
    WrapValidator,
)
from pydantic_core import InitErrorDetails


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
"""JSON knows one kind of number: 5.0 is 5."""
Item = TypeVar("Item")
MAX_SLICE = 512
"""Items of a list that one call checks."""


class _FirstError(FailFast):
    """``FailFast`` that can be in a union of types."""

    def __hash__(self) -> int:
        return hash(self.fail_fast)


def _by_slices(value: Any, check: Callable[[Any], list[Any]]) -> list[Any]:
    """Check a long list piece by piece: other threads run in between."""
    if not isinstance(value, list) or len(value) <= MAX_SLICE:
        return check(value)
    found: list[Any] = []
    for start in range(0, len(value), MAX_SLICE):
        try:
            found += check(value[start : start + MAX_SLICE])
        except ValidationError as err:
            raise _later(err, start) from None
    return found


def _later(error: ValidationError, start: int) -> ValidationError:
    """The same errors of a list of which ``start`` items were left out at the beginning."""
    found = [
        InitErrorDetails(
            type=one["type"],
            loc=(start + int(one["loc"][0]), *one["loc"][1:]) if one["loc"] else (),
            input=one["input"],
            ctx=one.get("ctx", {}),
        )
        for one in error.errors(include_url=False)
    ]
    return ValidationError.from_exception_data(error.title, found)


Items = Annotated[list[Item], _FirstError(), WrapValidator(_by_slices)]
"""A list of which the first wrong item ends the check: a body has room for millions."""


class StrictBody(BaseModel):
    """A JSON object: ``"5"`` is not a number, and unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
    SHAPES: ClassVar[Mapping[str, str]] = {}
    """What fields with several types may be, where the protocol has its own."""
