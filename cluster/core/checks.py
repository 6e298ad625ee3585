"""Checks of values, shared by sections of the configuration and by protocols."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

from cluster.core.errors import ConfigError


def check(ok: bool, name: str, value: object, rule: str) -> None:
    """Raise ``ConfigError`` unless ``ok``: the ``value`` of the field ``name`` breaks ``rule``."""
    if not ok:
        raise ConfigError(name, value, rule)


def check_choice(name: str, value: str | int, kind: Any) -> None:
    """Raise ``ConfigError`` unless ``value`` is one of the ``Literal`` type ``kind``."""
    choices = get_args(kind)
    check(value in choices, name, value, f"must be one of {', '.join(map(str, choices))}")


def check_each(
    section: object, names: str, ok: Callable[[Any], bool], rule: str, prefix: str = ""
) -> None:
    """Raise ``ConfigError`` unless every field in ``names`` (separated by blanks) satisfies ``ok``.

    A field that is None passes; an infinite value is an error. ``prefix`` precedes the field's name
    in the error.
    """
    for name in names.split():
        value = getattr(section, name)
        check(value not in (math.inf, -math.inf), f"{prefix}{name}", value, "must not be infinite")
        check(value is None or ok(value), f"{prefix}{name}", value, rule)


def finite_or_text(number: str) -> float | str:
    """Return a JSON number, or its text if it exceeds all floats: JSON has no infinity."""
    value = float(number)
    return value if math.isfinite(value) else number


def is_positive(value: float) -> bool:
    return value > 0


def is_at_least_1(value: float) -> bool:
    return value >= 1


def is_not_negative(value: float) -> bool:
    return value >= 0


def is_deeper(data: object, max_depth: int) -> bool:
    """Return whether objects and arrays of JSON data are nested more than ``max_depth`` deep."""
    level: list[Any] = [data]
    for _ in range(max_depth):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
