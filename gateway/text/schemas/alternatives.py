"""Expand a clean schema into alternatives: a value matches the schema if it matches one of them.

``{"anyOf": [A, B], "allOf": [C]}`` has the alternatives ``A and C``, ``B and C``: each is a tuple
of pieces that a value must match. Pieces have no ``$ref``, ``anyOf``, ``oneOf`` or ``allOf``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gateway.text.schemas.clean_schema import DEFINITION, TYPES, CleanSchema

MAX_ALTERNATIVES = 512
_MAX_STEPS = 5_000
TYPES_BUT_TEXTS = tuple(kind for kind in TYPES if kind != "string")
_APPLICATORS = ("$ref", "allOf", "anyOf", "oneOf")
Piece = Mapping[str, Any]
Alternative = tuple[Piece, ...]
_KINDS: Mapping[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    list: "array",
    dict: "object",
}


class UnfollowedError(Exception):
    """A schema cannot be expressed as a grammar; the message is a keyword or the reason."""


def alternatives(schema: Any, clean: CleanSchema, is_strict: bool) -> list[Alternative]:
    """Return the alternatives of a part of a schema.

    Raises:
        UnfollowedError: there are too many, or, if strict, members of a ``oneOf`` may overlap.
    """
    try:
        return _Expansion(clean, is_strict).of(schema, frozenset())
    except RecursionError as err:
        raise UnfollowedError("is nested too deeply") from err


class _Expansion:
    def __init__(self, clean: CleanSchema, is_strict: bool) -> None:
        self._definitions = clean.definitions
        self._is_strict = is_strict
        self._steps_left = _MAX_STEPS
        self._own: dict[int, Alternative] = {}
        self._known: dict[str, list[Alternative]] = {}
        self._num_circles = 0

    def of(self, schema: Any, above: frozenset[str]) -> list[Alternative]:
        """Return the alternatives of a schema.

        Args:
            schema: a clean schema.
            above: references being expanded at the same value; repeating them adds nothing.
        """
        self._use(1)
        if not isinstance(schema, Mapping):
            return [()] if schema else []
        own = self._own_piece(schema)
        found: list[Alternative] = [()]
        for key, value in schema.items():
            if key in _APPLICATORS:
                found = self._both(found, self._applied(key, value, above))
            else:
                found = self._both(found, [own])
        return found

    def _own_piece(self, schema: Piece) -> Alternative:
        """Return a schema without applicators, cached so that pieces are compared by identity."""
        if id(schema) not in self._own:
            own = {key: value for key, value in schema.items() if key not in _APPLICATORS}
            self._own[id(schema)] = (own,)
        return self._own[id(schema)]

    def _applied(self, key: str, value: Any, above: frozenset[str]) -> list[Alternative]:
        if key == "$ref":
            return self._named(value.removeprefix(DEFINITION), above)
        each = [self.of(one, above) for one in value]
        if key != "allOf":
            if key == "oneOf" and self._is_strict:
                _check_apart(each)
            return _distinct(one for group in each for one in group)
        found: list[Alternative] = [()]
        for one in each:
            found = self._both(found, one)
        return found

    def _named(self, name: str, above: frozenset[str]) -> list[Alternative]:
        """Return the alternatives of a definition; cached unless they depend on ``above``."""
        if name in above:
            self._num_circles += 1
            return []
        if name not in self._known:
            before = self._num_circles
            found = self.of(self._definitions[name], above | {name})
            if self._num_circles != before:
                return found
            self._known[name] = found
        return self._known[name]

    def _both(self, some: list[Alternative], more: list[Alternative]) -> list[Alternative]:
        self._use(len(some) * len(more))
        return _distinct(_joined(one, other) for one in some for other in more)

    def _use(self, num_steps: int) -> None:
        self._steps_left -= num_steps
        if self._steps_left < 0 or num_steps > MAX_ALTERNATIVES:
            raise UnfollowedError(f"has more than {MAX_ALTERNATIVES} alternatives")


def _joined(one: Alternative, other: Alternative) -> Alternative:
    known = set(map(id, one))
    return (*one, *(piece for piece in other if id(piece) not in known))


def _distinct(some: Iterable[Alternative]) -> list[Alternative]:
    return list({tuple(map(id, one)): one for one in some}.values())


def _check_apart(groups: Sequence[Sequence[Alternative]]) -> None:
    """Raise ``UnfollowedError`` if a value may match two members of a ``oneOf``."""
    for place, some in enumerate(groups):
        others = [one for group in groups[place + 1 :] for one in group]
        if not all(are_apart(one, other) for one in some for other in others):
            raise UnfollowedError("oneOf has alternatives that may overlap")


def are_apart(one: Alternative, other: Alternative) -> bool:
    """Whether two alternatives are known to be disjoint: by type, by values, by the values of a
    property, or because one requires a property that the other forbids."""
    if kinds_of_alternative(one).isdisjoint(kinds_of_alternative(other)):
        return True
    some, more = _only_values(one), _only_values(other)
    if some is not None and more is not None:
        return not any(value in more for value in some)
    if _needs_more(one, other) or _needs_more(other, one):
        return True
    tags, others = _tags(one), _tags(other)
    return any(
        not any(value in others[name] for value in values)
        for name, values in tags.items()
        if name in others
    )


def _needs_more(one: Alternative, other: Alternative) -> bool:
    """Whether ``one`` requires objects with a property that ``other`` forbids."""
    if kinds_of_alternative(one) != {"object"}:
        return False
    required = {name for piece in one for name in piece.get("required", ())}
    return any(
        piece.get("additionalProperties") is False
        and not piece.get("patternProperties")
        and not required <= piece.get("properties", {}).keys()
        for piece in other
    )


def _only_values(alternative: Alternative) -> list[Any] | None:
    return next((v for piece in alternative if (v := values_of(piece)) is not None), None)


def _tags(alternative: Alternative) -> dict[str, list[Any]]:
    """Return the allowed values of required properties with ``enum`` or ``const``, by name."""
    required = {name for piece in alternative for name in piece.get("required", ())}
    return {
        name: values
        for piece in alternative
        for name, schema in piece.get("properties", {}).items()
        if name in required
        and isinstance(schema, Mapping)
        and (values := values_of(schema)) is not None
    }


# ---- types -----------------------------------------------------------------------------------


def kind_of(value: object) -> str:
    """Return the JSON type of a value."""
    return _KINDS.get(type(value), "null")


def kinds_of_alternative(alternative: Alternative) -> frozenset[str]:
    """Return the JSON types that an alternative allows; ``number`` includes ``integer``."""
    found = frozenset(TYPES)
    for piece in alternative:
        named = piece.get("type", TYPES)
        found &= _with_integers([named] if isinstance(named, str) else named)
        if (values := values_of(piece)) is not None:
            found &= _with_integers(map(kind_of, values))
    return found


def values_of(piece: Piece) -> list[Any] | None:
    """Return the values of ``const`` or ``enum``; None without them."""
    if "const" in piece:
        return [piece["const"]]
    return piece.get("enum")


def _with_integers(kinds: Any) -> frozenset[str]:
    found = frozenset(kinds)
    return found | {"integer"} if "number" in found else found
