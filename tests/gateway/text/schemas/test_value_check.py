"""Whether values of model output match a schema."""

from __future__ import annotations

import math
from typing import Any

import pytest

from gateway.text.schemas import value_check
from gateway.text.schemas.clean_schema import CleanSchema
from gateway.text.schemas.value_check import ValueChecker


@pytest.mark.parametrize(
    ("value", "factor", "is_multiple"),
    [
        (6, 3, True),
        (7, 3, False),
        (10**400 + 1, 2, False),
        (10**400, 2, True),
        (0.75, 0.25, True),
        (0.8, 0.25, False),
        (10**400, 0.5, True),
        (1e300, 1e-300, True),
        (math.inf, 2, False),
        (-math.inf, 0.5, False),
    ],
)
def test_numbers_of_any_size_are_compared_with_a_factor(
    value: Any, factor: float, is_multiple: bool
) -> None:
    checker = ValueChecker(CleanSchema({}, {}))
    assert checker.fits(value, {"multipleOf": factor}) == is_multiple


def test_work_on_long_enums_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would otherwise block the event loop for seconds, for each value that a model writes."""
    compared: list[Any] = []

    def same(value: Any, other: Any) -> bool:
        compared.append(other)
        return bool(value == other)

    monkeypatch.setattr(value_check, "_same", same)
    definitions = {"x": {"enum": list(range(1000))}}
    checker = ValueChecker(CleanSchema({}, definitions))
    assert not checker.fits([-1] * 20, {"items": {"$ref": "#/$defs/x"}})
    assert checker.fits(-1, {"anyOf": [{"$ref": "#/$defs/x"}] * 2000})
    assert len(compared) < 1_000_000
