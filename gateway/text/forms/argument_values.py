"""Values of arguments that a model writes as plain text, as the JSON that their schema asks for."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from gateway.core.tool_use import Tool
from gateway.text.forms.alternatives import (
    UnfollowedError,
    alternatives,
    kind_of,
    kinds_of_alternative,
)
from gateway.text.forms.arguments import arguments_of
from gateway.text.forms.clean_schema import TYPES
from gateway.text.forms.value_check import ValueCheck

_WORDS = {"True": "true", "False": "false", "None": "null"}
"""How templates that are not careful show earlier arguments, and models learn to write them."""
_ALL = frozenset(TYPES)


class ValueReader:
    """What the arguments of one function mean.

    Args:
        tool: the function.
    """

    def __init__(self, tool: Tool) -> None:
        self._known = arguments_of(tool, is_strict=False)

    def writer(self, name: str, is_text: bool | None = None) -> ValueWriter:
        """What writes the argument ``name``; ``is_text``: the call itself says whether it is one,
        None where its form does not tell."""
        schema = self._known.schema_of(name)
        kinds = self._kinds(schema)
        if kinds == {"string"} or (is_text and "string" in kinds):
            return _TextWriter()
        check = ValueCheck(self._known.clean)
        return _AnyWriter(kinds, lambda value: check.fits(value, schema), is_json=is_text is False)

    def _kinds(self, schema: Any) -> frozenset[str]:
        """Types of which a value may be."""
        try:
            found = alternatives(schema, self._known.clean, is_strict=False)
        except UnfollowedError:
            return _ALL
        return frozenset[str]().union(*map(kinds_of_alternative, found)) or _ALL


class ValueWriter(ABC):
    """Writes one value as JSON while its text comes in; the cuts of the text do not matter."""

    @abstractmethod
    def feed(self, text: str) -> str:
        """The JSON text that is certain."""

    @abstractmethod
    def finish(self) -> str:
        """The rest, at the value's end."""

    @abstractmethod
    def give_up(self) -> str:
        """The rest, where the answer ends within the value."""


class _TextWriter(ValueWriter):
    def __init__(self) -> None:
        self._opening = '"'

    def feed(self, text: str) -> str:
        opening, self._opening = self._opening, ""
        return opening + _dump(text)[1:-1]

    def finish(self) -> str:
        return self.feed("") + '"'

    def give_up(self) -> str:
        return self.feed("")


class _AnyWriter(ValueWriter):
    """What a text means is known at its end only.

    Args:
        kinds: types of which the value may be.
        fits: whether a value follows the schema.
        is_json: the call says that it is no text.
    """

    def __init__(
        self, kinds: frozenset[str], fits: Callable[[Any], bool], is_json: bool = False
    ) -> None:
        self._kinds = kinds
        self._fits = fits
        self._is_json = is_json
        self._pieces: list[str] = []

    def feed(self, text: str) -> str:
        self._pieces.append(text)
        return ""

    def finish(self) -> str:
        return self._to_json("".join(self._pieces))

    def give_up(self) -> str:
        return self.finish()

    def _to_json(self, text: str) -> str:
        """JSON text of a value: the text itself if that is of a fitting type, else a string."""
        plain = text.strip()
        for written in (plain, _WORDS.get(plain, plain)):
            try:
                value = json.loads(written, parse_constant=_refuse)
            except (ValueError, RecursionError):
                continue
            if self._takes(value):
                return written
        return _dump(text)

    def _takes(self, value: Any) -> bool:
        """Whether a text is read as this value. One that may be a string without quotes is read
        as one with them only where it may be anything."""
        if isinstance(value, str):
            return self._kinds >= _ALL or (self._is_json and "string" in self._kinds)
        kind = kind_of(value)
        is_kind = kind in self._kinds or (kind == "number" and "integer" in self._kinds)
        return is_kind and ("string" not in self._kinds or self._fits(value))


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _dump(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
