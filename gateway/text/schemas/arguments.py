"""Derives the individual arguments of a function from its schema.

A schema may allow several sets of arguments, for example with ``anyOf`` at its root. Each set is
an ``ArgumentSet``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from gateway.core.tool_use import Tool
from gateway.text.schemas.alternatives import (
    Alternative,
    Piece,
    UnsupportedSchemaError,
    allowed_values,
    alternatives,
    types_of_alternative,
)
from gateway.text.schemas.clean_schema import CleanSchema, unsupported_schema
from gateway.text.schemas.one_of import argument_schema

_MAX_SET_ARGUMENTS = 2000
"""Maximum number of arguments in all ``ArgumentSet`` of a tool, as grammar sizes are limited."""
_MAX_READ = 20_000
"""Maximum number of schemas and required names that are read to make these sets."""
_KEY = "arguments"


@dataclass(frozen=True, kw_only=True, slots=True)
class ArgumentSet:
    """One set of a function's arguments that may be given together.

    All schemas have only keywords that grammars support.
    """

    properties: Mapping[str, Any]
    required: frozenset[str] = frozenset()
    patterns: Mapping[str, Any]
    """Schemas of additional arguments, by a regular expression of the arguments' names."""
    others: Any = False
    """Schema of arguments that match no name or pattern; False forbids these arguments."""
    min_arguments: int = 0
    """Minimum number of arguments in a call."""
    max_arguments: int | None = None
    """Maximum number of arguments in a call; None for no limit."""


@dataclass(frozen=True, slots=True)
class ToolArguments:
    """The arguments that the schema of a function allows, as one or more sets."""

    clean: CleanSchema
    argument_sets: Sequence[ArgumentSet]

    def schema_of(self, name: str) -> Any:
        """Return a schema for the argument ``name`` in any argument set; True allows any value."""
        schemas = [s.properties[name] for s in self.argument_sets if name in s.properties]
        if not schemas:
            others = (
                (*argument_set.patterns.values(), argument_set.others)
                for argument_set in self.argument_sets
            )
            schemas = [schema for schema in chain(*others) if schema is not False]
        return schemas[0] if len(schemas) == 1 else {"anyOf": schemas} if schemas else True


def tool_arguments(tool: Tool, is_strict: bool) -> ToolArguments:
    """Return the arguments of a tool.

    Args:
        tool: a tool with the schema of an object.
        is_strict: whether to reject a schema that a grammar cannot express; if False, such a
            schema allows any arguments.

    Raises:
        RequestError: ``is_strict``, and a grammar cannot express the schema.
    """
    if (cached := tool.derived.get(_KEY)) is not None:
        assert isinstance(cached, ToolArguments), "only this module sets it"
        return cached
    arguments = _arguments(tool, is_strict)
    tool.derived[_KEY] = arguments
    return arguments


def _arguments(tool: Tool, is_strict: bool) -> ToolArguments:
    clean = argument_schema(tool, is_strict)
    try:
        root_alternatives = alternatives(clean.root, clean, is_strict)
        objects = [one for one in root_alternatives if "object" in types_of_alternative(one)]
        if sum(map(_num_read, objects)) > _MAX_READ:
            raise UnsupportedSchemaError("has too many alternatives and arguments")
        argument_sets = [
            argument_set
            for one in objects
            if (argument_set := _argument_set(one, is_strict)) is not None
        ]
        if sum(len(argument_set.properties) for argument_set in argument_sets) > _MAX_SET_ARGUMENTS:
            raise UnsupportedSchemaError(f"has more than {_MAX_SET_ARGUMENTS} arguments")
        if is_strict and not argument_sets:
            raise UnsupportedSchemaError("allows no arguments")
    except UnsupportedSchemaError as err:
        if is_strict:
            raise unsupported_schema(tool, (), str(err)) from err
        argument_sets = []
    return ToolArguments(
        clean, argument_sets or [ArgumentSet(properties={}, patterns={}, others=True)]
    )


def _num_read(pieces: Alternative) -> int:
    """Return the number of schemas and required names that ``_argument_set`` reads, at most."""
    names = (len(piece.get(key, ())) for piece in pieces for key in ("properties", "required"))
    return len(pieces) * sum(names)


def _argument_set(pieces: Alternative, is_strict: bool) -> ArgumentSet | None:
    """Return the argument set that all schemas ``pieces`` allow; None if no arguments match all."""
    names = dict.fromkeys(chain(*(piece.get("properties", {}) for piece in pieces)))
    required = dict.fromkeys(chain(*(piece.get("required", ()) for piece in pieces)))
    limiting = [p for p in pieces if "additionalProperties" in p or p.get("patternProperties")]
    if is_strict:
        _check_supported(pieces, names, limiting)
    patterns: dict[str, Any] = {}
    for piece in limiting:
        patterns |= piece.get("patternProperties", {})
    is_closed = bool(names) or any("properties" in piece for piece in pieces)
    additional = [piece.get("additionalProperties", True) for piece in limiting]
    others = _all_of(additional) if limiting else not is_closed
    properties: dict[str, Any] = {}
    for name in (*names, *(name for name in required if name not in names)):
        schema = _all_of([_argument_schema(piece, name) for piece in pieces])
        if schema is False and name in required and (is_strict or name in names):
            return None
        if schema is not False or name in required:
            properties[name] = schema or True
    limits = [piece["maxProperties"] for piece in pieces if "maxProperties" in piece]
    return ArgumentSet(
        properties=properties,
        required=frozenset(required),
        patterns=patterns,
        others=others,
        min_arguments=max((piece.get("minProperties", 0) for piece in pieces), default=0),
        max_arguments=min(limits, default=None),
    )


def _argument_schema(piece: Piece, name: str) -> Any:
    """Return the schema of the argument ``name`` in ``piece``, a schema of an object."""
    if name in piece.get("properties", {}):
        return piece["properties"][name]
    if piece.get("patternProperties"):
        return {"anyOf": [*piece["patternProperties"].values()]}
    return piece.get("additionalProperties", True)


def _all_of(schemas: Sequence[Any]) -> Any:
    """Combine schemas that a value must all match into one schema."""
    if any(schema is False for schema in schemas):
        return False
    distinct = {id(schema): schema for schema in schemas if schema is not True}
    limiting = [schema for schema in distinct.values() if schema]
    if len(limiting) < 2:
        return limiting[0] if limiting else True
    return {"allOf": limiting}


def _check_supported(
    pieces: Alternative,
    names: Mapping[str, Any],
    limiting: Sequence[Piece],
) -> None:
    """Raise ``UnsupportedSchemaError`` for keywords that an ``ArgumentSet`` cannot express."""
    has_patterns = any(piece.get("patternProperties") for piece in pieces)
    if has_patterns and (names or len(limiting) > 1):
        raise UnsupportedSchemaError("has patternProperties beside properties")
    for piece in pieces:
        if allowed_values(piece) is not None:
            raise UnsupportedSchemaError("has an enum or const for the whole arguments")
