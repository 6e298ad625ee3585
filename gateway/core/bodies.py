"""Base class and field types of all HTTP bodies."""

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


def _to_integer(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_to_integer)]
"""An integer; 5.0 is accepted as 5, since JSON has one type of number."""
Item = TypeVar("Item")
MAX_SLICE = 512
"""Number of list items that are validated at a time."""


class _FirstError(FailFast):
    """``FailFast`` that can be hashed, as types in a union must be."""

    def __hash__(self) -> int:
        return hash(self.fail_fast)


def _validate_slices(value: Any, check: Callable[[Any], list[Any]]) -> list[Any]:
    """Validate a long list in slices so that other threads can run in between."""
    if not isinstance(value, list) or len(value) <= MAX_SLICE:
        return check(value)
    found: list[Any] = []
    for start in range(0, len(value), MAX_SLICE):
        try:
            found += check(value[start : start + MAX_SLICE])
        except ValidationError as err:
            raise _shift_indexes(err, start) from None
    return found


def _shift_indexes(error: ValidationError, start: int) -> ValidationError:
    """Shift the list indexes of an error by ``start``."""
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


Items = Annotated[list[Item], _FirstError(), WrapValidator(_validate_slices)]
"""A list whose validation stops at the first error, as it may have millions of items."""


class StrictBody(BaseModel):
    """A JSON object in strict mode (``"5"`` is not a number); unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
    SHAPES: ClassVar[Mapping[str, str]] = {}
    """Descriptions of the fields that accept several types, for error messages."""
