"""Expands a JSON schema into alternatives: a value matches the schema if it matches an alternative.

``{"anyOf": [A, B], "allOf": [C]}`` has the alternatives ``A and C``, ``B and C``: each is a tuple
of pieces that a value must match. Pieces have no ``$ref``, ``anyOf``, ``oneOf`` or ``allOf``.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.text.schemas.clean_schema import DEFINITION, TYPES, CleanSchema

MAX_ALTERNATIVES = 512
_MAX_STEPS = 5_000
_MAX_WORK = 100_000
"""Maximum number of pieces, and of values of ``enum`` in them, that are combined for a schema."""
NON_STRING_TYPES = tuple(kind for kind in TYPES if kind != "string")
_APPLICATORS = ("$ref", "allOf", "anyOf", "oneOf")
Piece = Mapping[str, Any]
Alternative = tuple[Piece, ...]
_JSON_TYPES: Mapping[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    list: "array",
    dict: "object",
}


class UnsupportedSchemaError(Exception):
    """Raised if a JSON schema cannot be expressed as a grammar. The message is the reason."""


@dataclass(slots=True)
class WorkLimit:
    """The work that is left for one or more calls of ``alternatives``."""

    left: int = _MAX_WORK


def alternatives(
    schema: Any, clean: CleanSchema, is_strict: bool, work: WorkLimit | None = None
) -> list[Alternative]:
    """Return the alternatives of ``schema``, which is a part of ``clean``.

    Each alternative is a tuple of schemas that have no reference or combination at their top level.
    A value matches ``schema`` if it matches all schemas of one alternative.

    Args:
        schema: the schema.
        clean: the schema of all arguments.
        is_strict: whether to reject members of a ``oneOf`` that may overlap.
        work: limit of this and further calls together; None limits this call alone.

    Raises:
        UnsupportedSchemaError: too many alternatives, values or levels; or ``is_strict``, and
            members of a ``oneOf`` may overlap.
    """
    try:
        return _Expansion(clean, is_strict, work or WorkLimit()).expand(schema, frozenset())
    except RecursionError as err:
        raise UnsupportedSchemaError("is nested too deeply") from err


class _Expansion:
    def __init__(self, clean: CleanSchema, is_strict: bool, work: WorkLimit) -> None:
        self._definitions = clean.definitions
        self._is_strict = is_strict
        self._work = work
        self._steps_left = _MAX_STEPS
        self._own_pieces: dict[int, Alternative] = {}
        self._expanded_definitions: dict[str, list[Alternative]] = {}
        self._num_cycles = 0

    def expand(self, schema: Any, above: frozenset[str]) -> list[Alternative]:
        """Return the alternatives of a schema.

        Args:
            schema: a clean schema.
            above: definitions that are being expanded; a reference to one of them is a cycle.
        """
        self._spend_steps(1)
        if not isinstance(schema, Mapping):
            return [()] if schema else []
        own_piece = self._own_piece(schema)
        is_own_combined = False
        expanded: list[Alternative] = [()]
        for key, value in schema.items():
            if key in _APPLICATORS:
                expanded = self._combine(expanded, self._expand_keyword(key, value, above))
            elif not is_own_combined:
                expanded = self._combine(expanded, [own_piece])
                is_own_combined = True
        return expanded

    def _own_piece(self, schema: Piece) -> Alternative:
        """Return the keywords of a schema other than references and combinations, as one piece.

        The piece is cached, so that pieces are compared by identity.
        """
        if id(schema) not in self._own_pieces:
            own_keywords = {key: value for key, value in schema.items() if key not in _APPLICATORS}
            self._own_pieces[id(schema)] = (own_keywords,)
        return self._own_pieces[id(schema)]

    def _expand_keyword(self, key: str, value: Any, above: frozenset[str]) -> list[Alternative]:
        if key == "$ref":
            return self._expand_definition(value.removeprefix(DEFINITION), above)
        each = [self.expand(one, above) for one in value]
        if key != "allOf":
            if key == "oneOf" and self._is_strict:
                _check_disjoint(each)
            return _deduplicate(one for group in each for one in group)
        combined: list[Alternative] = [()]
        for one in each:
            combined = self._combine(combined, one)
        return combined

    def _expand_definition(self, name: str, above: frozenset[str]) -> list[Alternative]:
        """Return the alternatives of a definition; they are cached unless they depend on ``above``.

        A definition that is being expanded (a cycle) has no alternatives.
        """
        if name in above:
            self._num_cycles += 1
            return []
        if name not in self._expanded_definitions:
            before = self._num_cycles
            expanded = self.expand(self._definitions[name], above | {name})
            if self._num_cycles != before:
                return expanded
            self._expanded_definitions[name] = expanded
        return self._expanded_definitions[name]

    def _combine(self, first: list[Alternative], others: list[Alternative]) -> list[Alternative]:
        self._spend_steps(len(first) * len(others))
        self._work.left -= len(others) * _num_parts(first) + len(first) * _num_parts(others)
        if self._work.left < 0:
            raise UnsupportedSchemaError("has too many alternatives and values")
        return _deduplicate(_merge_pieces(one, other) for one in first for other in others)

    def _spend_steps(self, num_steps: int) -> None:
        self._steps_left -= num_steps
        if self._steps_left < 0 or num_steps > MAX_ALTERNATIVES:
            raise UnsupportedSchemaError(f"has more than {MAX_ALTERNATIVES} alternatives")


def _num_parts(expanded: list[Alternative]) -> int:
    """Return the number of pieces of alternatives, and of values of ``enum`` in them."""
    return sum(1 + len(piece.get("enum", ())) for one in expanded for piece in one)


def _merge_pieces(one: Alternative, other: Alternative) -> Alternative:
    first_ids = set(map(id, one))
    return (*one, *(piece for piece in other if id(piece) not in first_ids))


def _deduplicate(expanded: Iterable[Alternative]) -> list[Alternative]:
    return list({tuple(map(id, one)): one for one in expanded}.values())


def _check_disjoint(groups: Sequence[Sequence[Alternative]]) -> None:
    """Raise ``UnsupportedSchemaError`` if a value may match two members of a ``oneOf``."""
    traits = [list(map(Traits.of, members)) for members in groups]
    for index, members in enumerate(traits):
        others = [one for group in traits[index + 1 :] for one in group]
        if not all(one.are_disjoint_from(other) for one in members for other in others):
            raise UnsupportedSchemaError("has a oneOf whose alternatives may overlap")


@dataclass(frozen=True, slots=True)
class Traits:
    """What distinguishes an alternative from others. Allowed values are given by their keys."""

    types: frozenset[str]
    values: frozenset[Hashable] | None
    """The allowed values; None without ``enum`` or ``const``."""
    required: frozenset[str]
    closed: tuple[frozenset[str], ...]
    """Names of the properties in each piece that forbids all other properties."""
    tags: Mapping[str, frozenset[Hashable]]
    """The allowed values of the required properties that have ``enum`` or ``const``."""

    @staticmethod
    def of(alternative: Alternative) -> Traits:
        """Return the traits of an alternative, in time linear in its size."""
        values = (allowed_values(piece) for piece in alternative)
        first_values = next((one for one in values if one is not None), None)
        return Traits(
            types=types_of_alternative(alternative),
            values=None if first_values is None else frozenset(map(_key, first_values)),
            required=frozenset(name for piece in alternative for name in piece.get("required", ())),
            closed=tuple(
                frozenset(piece.get("properties", ()))
                for piece in alternative
                if piece.get("additionalProperties") is False and not piece.get("patternProperties")
            ),
            tags=_property_values(alternative),
        )

    def are_disjoint_from(self, other: Traits) -> bool:
        """Whether certainly no value matches both alternatives: by type, by values, by the values
        of a property, or because one alternative requires a property that the other forbids."""
        if self.types.isdisjoint(other.types):
            return True
        if self.values is not None and other.values is not None:
            return self.values.isdisjoint(other.values)
        if self._requires_forbidden(other) or other._requires_forbidden(self):
            return True
        return any(
            values.isdisjoint(other.tags[name])
            for name, values in self.tags.items()
            if name in other.tags
        )

    def _requires_forbidden(self, other: Traits) -> bool:
        """Whether the alternative requires objects with a property that ``other`` forbids."""
        return self.types == {"object"} and not all(map(self.required.issubset, other.closed))


def _property_values(alternative: Alternative) -> dict[str, frozenset[Hashable]]:
    """Return the allowed values of the required properties that have ``enum`` or ``const``."""
    required = {name for piece in alternative for name in piece.get("required", ())}
    return {
        name: frozenset(map(_key, values))
        for piece in alternative
        for name, schema in piece.get("properties", {}).items()
        if name in required
        and isinstance(schema, Mapping)
        and (values := allowed_values(schema)) is not None
    }


def _key(value: Any) -> Hashable:
    """Return a key that only equal JSON values have. The keys of numbers are their digits, because
    clients can find many numbers with the same hash."""
    if isinstance(value, Mapping):
        return frozenset((name, _key(one)) for name, one in value.items())
    if isinstance(value, list):
        return tuple(map(_key, value))
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (hex(value) if isinstance(value, int) else value.hex()).encode()
    return str(value).encode() if isinstance(value, bool) else value


# ---- types -----------------------------------------------------------------------------------


def json_type_of(value: object) -> str:
    """Return the JSON type of a value."""
    return _JSON_TYPES.get(type(value), "null")


def types_of_alternative(alternative: Alternative) -> frozenset[str]:
    """Return the JSON types that an alternative allows; ``number`` includes ``integer``."""
    types = frozenset(TYPES)
    for piece in alternative:
        named = piece.get("type", TYPES)
        types &= _with_integers([named] if isinstance(named, str) else named)
        if (values := allowed_values(piece)) is not None:
            types &= _with_integers(map(json_type_of, values))
    return types


def allowed_values(piece: Piece) -> list[Any] | None:
    """Return the values of ``const`` or ``enum``; None without them."""
    if "const" in piece:
        return [piece["const"]]
    return piece.get("enum")


def _with_integers(kinds: Any) -> frozenset[str]:
    types = frozenset(kinds)
    return types | {"integer"} if "number" in types else types
