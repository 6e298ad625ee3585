"""Values of arguments that a model writes as plain text, as the JSON that their schema asks for."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from gateway.text.forms.schemas import ANY, ARRAY, NULL, OBJECT, Schema

STRING, BOOLEAN, NUMBER, INTEGER = "string", "boolean", "number", "integer"
_KINDS = {str: STRING, bool: BOOLEAN, int: INTEGER, float: NUMBER, list: ARRAY, dict: OBJECT}
_KNOWN = frozenset({*_KINDS.values(), NULL})
_WORDS = {"True": "true", "False": "false", "None": "null"}
"""How templates that are not careful show earlier arguments, and models learn to write them."""


def argument_schemas(parameters: Mapping[str, Any] | None) -> dict[str, Schema]:
    """The schemas of a function's arguments, by name."""
    return Schema.of(parameters or {}).properties


def kinds_of(schema: Schema | None) -> frozenset[str]:
    """Names of the types of which a value may be; ``ANY`` among them: it may be of all.

    For example ``{"anyOf": [{"type": "string"}, {"type": "null"}]}`` gives ``string`` and ``null``.
    """
    if schema is None or "allOf" in schema.data:
        return frozenset({ANY})
    if schema.values:
        found = {_kind(value) for value in schema.values}
    elif schema.has_variants:
        found = {kind for variant in schema.variants for kind in kinds_of(variant)}
    else:
        found = {kind if kind in _KNOWN else ANY for kind in schema.kinds or [ANY]}
    return frozenset(found | {NULL} if schema.may_be_null else found)


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


def value_writer(schema: Schema | None, is_text: bool = False) -> ValueWriter:
    """What writes a value; ``is_text``: the call itself says that it is a string."""
    kinds = kinds_of(schema)
    if kinds == {STRING} or (is_text and (ANY in kinds or STRING in kinds)):
        return _TextWriter()
    return _AnyWriter(kinds)


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
    """What a text means is known at its end only."""

    def __init__(self, kinds: frozenset[str]) -> None:
        self._kinds = kinds
        self._pieces: list[str] = []

    def feed(self, text: str) -> str:
        self._pieces.append(text)
        return ""

    def finish(self) -> str:
        return _to_json("".join(self._pieces), self._kinds)

    def give_up(self) -> str:
        return self.finish()


def _to_json(text: str, kinds: frozenset[str]) -> str:
    """JSON text of a value: the text itself if that is of a fitting type, else a string."""
    plain = text.strip()
    for written in (plain, _WORDS.get(plain, plain)):
        kind = _kind_of_text(written)
        if kind is not None and _fits(kind, kinds):
            return written
    return _dump(text)


def _fits(kind: str, kinds: frozenset[str]) -> bool:
    """A text that is a string without its quotes is not read as one with them."""
    if kind == STRING:
        return ANY in kinds and STRING not in kinds
    if kind in (INTEGER, NUMBER):
        return not kinds.isdisjoint({INTEGER, NUMBER, ANY})
    return kind in kinds or ANY in kinds


def _kind_of_text(text: str) -> str | None:
    """The type of a JSON text; None: it is none."""
    try:
        return _kind(json.loads(text, parse_constant=_refuse))
    except (ValueError, RecursionError):
        return None


def _kind(value: object) -> str:
    return _KINDS.get(type(value), NULL)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _dump(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
