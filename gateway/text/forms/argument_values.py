"""Values of arguments that a model writes as plain text, as the JSON that their schema asks for."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from gateway.core.tool_use import Tool
from gateway.text.schemas.alternatives import (
    UnfollowedError,
    alternatives,
    kind_of,
    kinds_of_alternative,
)
from gateway.text.schemas.arguments import arguments_of
from gateway.text.schemas.clean_schema import TYPES
from gateway.text.schemas.text_rules import text_rules
from gateway.text.schemas.value_check import ValueCheck

_WORDS = {"True": "true", "False": "false", "None": "null"}
"""How templates that are not careful show earlier arguments, and models learn to write them."""
_ALL = frozenset(TYPES)
ANY_OPENING = "*"
_JSON_OPENINGS = '{["-0123456789tfn'
"""A JSON value begins with one of these."""


class ValueReader:
    """What the arguments of one function mean.

    Args:
        tool: the function.
    """

    def __init__(self, tool: Tool) -> None:
        self._known = arguments_of(tool, is_strict=False)

    def writer(self, name: str, said: str | None = None) -> ValueWriter:
        """What writes an argument.

        Args:
            name: of the argument.
            said: ``true`` or ``false``: the call says whether it is a text; None: it does not say.
        """
        schema = self._known.schema_of(name)
        kinds, openings = self._kinds(schema)
        if kinds == {"string"} or (said == "true" and "string" in kinds):
            return _TextWriter()
        check = ValueCheck(self._known.clean)
        writer = _AnyWriter(kinds, lambda value: check.fits(value, schema), said == "false")
        writer.json_openings = ANY_OPENING if said == "false" else openings
        return writer

    def _kinds(self, schema: Any) -> tuple[frozenset[str], str]:
        """Types of which a value may be, and what only JSON can begin with."""
        try:
            found = alternatives(schema, self._known.clean, is_strict=False)
            rules = text_rules(found, is_strict=False)
        except UnfollowedError:
            return _ALL, ""
        kinds = frozenset[str]().union(*map(kinds_of_alternative, found)) or _ALL
        if "string" not in kinds:
            return kinds, ANY_OPENING
        words = [word for rule in rules for word in rule.values or ("{", "[")]
        return kinds, "".join(c for c in "{[" if not any(w.lstrip()[:1] == c for w in words))


class ValueWriter(ABC):
    """Writes one value as JSON while its text comes in; the cuts of the text do not matter."""

    json_openings = ""
    """A text that begins with one of these is JSON, whose strings may hold any mark;
    ``ANY_OPENING``: any text is."""

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
        self._reads_strings = is_json
        self._pieces: list[str] = []

    def feed(self, text: str) -> str:
        self._pieces.append(text)
        return ""

    def finish(self) -> str:
        return self._to_json("".join(self._pieces))

    def give_up(self) -> str:
        """The beginning of the value, which is of the type that its first character tells."""
        text = "".join(self._pieces)
        plain = text.strip()
        is_json = "string" not in self._kinds or self.json_openings == ANY_OPENING
        if plain[:1] in (_JSON_OPENINGS if is_json else self.json_openings):
            return plain
        return _dump(text)[:-1]

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
            return self._kinds >= _ALL or (self._reads_strings and "string" in self._kinds)
        kind = kind_of(value)
        is_kind = kind in self._kinds or (kind == "number" and "integer" in self._kinds)
        return is_kind and ("string" not in self._kinds or self._fits(value))


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _dump(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
