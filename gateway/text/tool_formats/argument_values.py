"""Converts argument values that a model writes as plain text to JSON that matches their schema."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from gateway.core.tool_use import Tool
from gateway.text.schemas.alternatives import (
    UnsupportedSchemaError,
    alternatives,
    json_type_of,
    types_of_alternative,
)
from gateway.text.schemas.arguments import tool_arguments
from gateway.text.schemas.clean_schema import TYPES
from gateway.text.schemas.text_rules import text_rules
from gateway.text.schemas.value_check import ValueChecker

_WORDS = {"True": "true", "False": "false", "None": "null"}
"""JSON for Python literals, which models write because some chat templates show earlier arguments
as Python literals."""
_ALL = frozenset(TYPES)
ANY_OPENING = "*"
_JSON_OPENINGS = '{["-0123456789tfn'
"""Possible first characters of a JSON value."""


class ValueWriters:
    """Creates the writers that convert argument values of one function to JSON.

    Args:
        tool: the function.
    """

    def __init__(self, tool: Tool) -> None:
        self._arguments = tool_arguments(tool, is_strict=False)

    def make_writer(self, name: str, is_text_flag: str | None = None) -> ValueWriter:
        """Return the writer that converts the value of one argument to JSON.

        Args:
            name: name of the argument.
            is_text_flag: ``true`` or ``false`` if the call states whether the value is a text, else
                None.
        """
        schema = self._arguments.schema_of(name)
        kinds, openings = self._types_and_openings(schema)
        if kinds == {"string"} or (is_text_flag == "true" and "string" in kinds):
            return _TextWriter()
        check = ValueChecker(self._arguments.clean)
        writer = _AnyWriter(kinds, lambda value: check.fits(value, schema), is_text_flag == "false")
        writer.json_openings = ANY_OPENING if is_text_flag == "false" else openings
        return writer

    def _types_and_openings(self, schema: Any) -> tuple[frozenset[str], str]:
        """Return the JSON types that a schema allows, and the first characters that only JSON
        values, not texts, can have."""
        try:
            schema_alternatives = alternatives(schema, self._arguments.clean, is_strict=False)
            rules = text_rules(schema_alternatives, is_strict=False)
        except UnsupportedSchemaError:
            return _ALL, ""
        kinds = frozenset[str]().union(*map(types_of_alternative, schema_alternatives)) or _ALL
        if "string" not in kinds:
            return kinds, ANY_OPENING
        openings_of_texts = [word for rule in rules for word in rule.values or ("{", "[")]
        return kinds, "".join(
            c for c in "{[" if not any(w.lstrip()[:1] == c for w in openings_of_texts)
        )


class ValueWriter(ABC):
    """Converts the text of one argument value to JSON, piece by piece.

    The JSON does not depend on how the text is split into pieces.
    """

    json_openings = ""
    """First characters of values that are certainly JSON, in whose strings any delimiter may occur.
    Empty if no first character is certain; ``ANY_OPENING`` if every value is JSON."""

    @abstractmethod
    def feed(self, text: str) -> str:
        """Add the next piece of the value and return the JSON text that is final."""

    @abstractmethod
    def finish(self) -> str:
        """Return the rest of the JSON text at the end of the value."""

    @abstractmethod
    def finish_incomplete(self) -> str:
        """Return the rest of the JSON text if the answer ends within the value."""


class _TextWriter(ValueWriter):
    def __init__(self) -> None:
        self._opening = '"'

    def feed(self, text: str) -> str:
        opening, self._opening = self._opening, ""
        return opening + _to_json_string(text)[1:-1]

    def finish(self) -> str:
        return self.feed("") + '"'

    def finish_incomplete(self) -> str:
        return self.feed("")


class _AnyWriter(ValueWriter):
    """Writer of a value that need not be a text. It returns JSON at the end of the value.

    Args:
        kinds: allowed types of the value.
        fits: returns whether a value matches the schema.
        is_json: whether the call states that the value is not a text.
    """

    def __init__(
        self, kinds: frozenset[str], fits: Callable[[Any], bool], is_json: bool = False
    ) -> None:
        self._types = kinds
        self._fits = fits
        self._reads_strings = is_json
        self._pieces: list[str] = []

    def feed(self, text: str) -> str:
        self._pieces.append(text)
        return ""

    def finish(self) -> str:
        return self._to_json("".join(self._pieces))

    def finish_incomplete(self) -> str:
        """Return the JSON of an incomplete value, whose first character determines its type."""
        text = "".join(self._pieces)
        plain = text.strip()
        is_json = "string" not in self._types or self.json_openings == ANY_OPENING
        if plain[:1] in (_JSON_OPENINGS if is_json else self.json_openings):
            return plain
        return _to_json_string(text)[:-1]

    def _to_json(self, text: str) -> str:
        """Return the JSON of a value: the text if it is JSON of an allowed type, else a string."""
        plain = text.strip()
        for written in (plain, _WORDS.get(plain, plain)):
            try:
                value = json.loads(written, parse_constant=_reject_constant)
            except (ValueError, RecursionError):
                continue
            if self._accepts(value):
                return written
        return _to_json_string(text)

    def _accepts(self, value: Any) -> bool:
        """Whether to read a text as the JSON ``value``. A text in quotes is a JSON string only if
        all types are allowed, or if the call states that the value is JSON."""
        if isinstance(value, str):
            return self._types >= _ALL or (self._reads_strings and "string" in self._types)
        kind = json_type_of(value)
        is_kind = kind in self._types or (kind == "number" and "integer" in self._types)
        return is_kind and ("string" not in self._types or self._fits(value))


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _to_json_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
