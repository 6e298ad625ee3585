"""Checks whether a value matches a JSON schema, to tell texts from other values in model output.

Patterns and formats of texts are not checked. The work is limited; beyond the limit a value counts
as matching.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gateway.text.schemas.alternatives import json_type_of
from gateway.text.schemas.clean_schema import DEFINITION, CleanSchema

_MAX_STEPS = 10_000
_VALUES_PER_STEP = 50
"""Number of values of an ``enum`` whose comparison takes about as long as another step."""
_LEAST = {"string": "minLength", "array": "minItems", "object": "minProperties"}
_MOST = {"string": "maxLength", "array": "maxItems", "object": "maxProperties"}


class ValueChecker:
    """Checks whether one value matches a JSON schema, with limited work.

    Args:
        clean: the clean schema that contains the schemas to check.
    """

    def __init__(self, clean: CleanSchema) -> None:
        self._definitions = clean.definitions
        self._steps_left = _MAX_STEPS

    def fits(self, value: Any, schema: Any) -> bool:
        try:
            return self._fits(value, schema)
        except RecursionError:
            return True

    def _fits(self, value: Any, schema: Any) -> bool:
        self._steps_left -= 1
        if self._steps_left < 0:
            return True
        if not isinstance(schema, Mapping):
            return bool(schema)
        self._steps_left -= len(schema.get("enum", ())) // _VALUES_PER_STEP
        return (
            self._fits_applied(value, schema)
            and _fits_type(value, schema)
            and _fits_limits(value, schema)
            and self._fits_inside(value, schema)
        )

    def _fits_applied(self, value: Any, schema: Mapping[str, Any]) -> bool:
        groups = [schema[key] for key in ("anyOf", "oneOf") if key in schema]
        every = [*schema.get("allOf", ())]
        if "$ref" in schema:
            every.append(self._definitions[schema["$ref"].removeprefix(DEFINITION)])
        return all(self._fits(value, one) for one in every) and all(
            any(self._fits(value, one) for one in group) for group in groups
        )

    def _fits_inside(self, value: Any, schema: Mapping[str, Any]) -> bool:
        if isinstance(value, list):
            first = schema.get("prefixItems", [])
            rest = schema.get("items", True)
            schemas = [*first[: len(value)], *[rest] * (len(value) - len(first))]
            return all(map(self._fits, value, schemas))
        if isinstance(value, dict):
            named = schema.get("properties", {})
            others = schema.get("additionalProperties", True)
            has_patterns = bool(schema.get("patternProperties"))
            return all(name in value for name in schema.get("required", ())) and all(
                self._fits(one, named.get(name, has_patterns or others))
                for name, one in value.items()
            )
        return True


def _fits_type(value: Any, schema: Mapping[str, Any]) -> bool:
    if "const" in schema and not _same(value, schema["const"]):
        return False
    if "enum" in schema and not any(_same(value, one) for one in schema["enum"]):
        return False
    if "type" not in schema:
        return True
    named = schema["type"]
    kinds = [named] if isinstance(named, str) else named
    kind = json_type_of(value)
    is_whole = kind == "number" and float(value).is_integer()
    return (
        kind in kinds
        or ("number" in kinds and kind == "integer")
        or ("integer" in kinds and is_whole)
    )


def _fits_limits(value: Any, schema: Mapping[str, Any]) -> bool:
    kind = json_type_of(value)
    if kind in _LEAST:
        min_size, max_size = schema.get(_LEAST[kind], 0), schema.get(_MOST[kind])
        return len(value) >= min_size and (max_size is None or len(value) <= max_size)
    if kind not in ("integer", "number"):
        return True
    low, high = schema.get("minimum"), schema.get("maximum")
    over, under = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if isinstance(over, bool):  # draft 4
        over = low if over else None
    if isinstance(under, bool):
        under = high if under else None
    factor = schema.get("multipleOf")
    return (
        (low is None or value >= low)
        and (high is None or value <= high)
        and (over is None or value > over)
        and (under is None or value < under)
        and (factor is None or _is_multiple(value, factor))
    )


def _is_multiple(value: float, factor: float) -> bool:
    """Whether a number is a multiple of ``factor``, up to rounding errors of their quotient."""
    if isinstance(value, int) and isinstance(factor, int):
        return value % factor == 0
    try:
        quotient = value / factor
        return abs(quotient - round(quotient)) < 1e-9
    except OverflowError:  # too large for a float, so that its digits after the point are unknown
        return value not in (math.inf, -math.inf)


def _same(value: Any, other: Any) -> bool:
    """Whether two JSON values are equal; unlike in Python, ``True`` and 1 differ."""
    return isinstance(value, bool) is isinstance(other, bool) and bool(value == other)
