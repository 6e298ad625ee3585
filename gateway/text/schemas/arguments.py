"""The individual arguments of a function, derived from its schema.

A schema may allow several sets of arguments (for example with ``anyOf`` at its root): each set is a
``Shape``.
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

_MAX_SHAPE_ARGUMENTS = 2000
"""Maximum number of arguments of all shapes; the size of grammars is limited."""
_KEY = "arguments"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One set of arguments that may be given together; all schemas are clean."""

    properties: Mapping[str, Any]
    required: frozenset[str] = frozenset()
    patterns: Mapping[str, Any]
    """Schemas of additional arguments by a pattern of their names."""
    others: Any = False
    """Schema of all other arguments; False forbids them."""
    min_arguments: int = 0
    """Minimum number of arguments."""
    max_arguments: int | None = None
    """Maximum number of arguments; None for no limit."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments of a function."""

    clean: CleanSchema
    shapes: Sequence[Shape]

    def schema_of(self, name: str) -> Any:
        """Return the schema of one argument in any of the shapes."""
        schemas = [s.properties[name] for s in self.shapes if name in s.properties]
        if not schemas:
            others = ((*shape.patterns.values(), shape.others) for shape in self.shapes)
            schemas = [schema for schema in chain(*others) if schema is not False]
        return schemas[0] if len(schemas) == 1 else {"anyOf": schemas} if schemas else True


def arguments_of(tool: Tool, is_strict: bool) -> Arguments:
    """Return the arguments of a tool.

    Args:
        tool: a tool with the schema of an object.
        is_strict: whether to reject a schema that a grammar cannot express; if False, such a
            schema allows any arguments.

    Raises:
        RequestError: ``is_strict``, and a grammar cannot express the schema.
    """
    if (cached := tool.derived.get(_KEY)) is not None:
        assert isinstance(cached, Arguments), "only this module sets it"
        return cached
    arguments = _arguments(tool, is_strict)
    tool.derived[_KEY] = arguments
    return arguments


def _arguments(tool: Tool, is_strict: bool) -> Arguments:
    clean = argument_schema(tool, is_strict)
    try:
        root_alternatives = alternatives(clean.root, clean, is_strict)
        objects = [one for one in root_alternatives if "object" in types_of_alternative(one)]
        shapes = [shape for one in objects if (shape := _shape(one, is_strict)) is not None]
        if sum(len(shape.properties) for shape in shapes) > _MAX_SHAPE_ARGUMENTS:
            raise UnsupportedSchemaError(f"has more than {_MAX_SHAPE_ARGUMENTS} arguments")
        if is_strict and not shapes:
            raise UnsupportedSchemaError("allows no arguments")
    except UnsupportedSchemaError as err:
        if is_strict:
            raise unsupported_schema(tool, (), str(err)) from err
        shapes = []
    return Arguments(clean, shapes or [Shape(properties={}, patterns={}, others=True)])


def _shape(pieces: Alternative, is_strict: bool) -> Shape | None:
    """Return the arguments that all pieces allow; None if no value can match them."""
    names = dict.fromkeys(chain(*(piece.get("properties", {}) for piece in pieces)))
    required = dict.fromkeys(chain(*(piece.get("required", ()) for piece in pieces)))
    speaking = [p for p in pieces if "additionalProperties" in p or p.get("patternProperties")]
    if is_strict:
        _check_supported(pieces, names, speaking)
    patterns: dict[str, Any] = {}
    for piece in speaking:
        patterns |= piece.get("patternProperties", {})
    is_closed = bool(names) or any("properties" in piece for piece in pieces)
    additional = [piece.get("additionalProperties", True) for piece in speaking]
    others = _all_of(additional) if speaking else not is_closed
    properties: dict[str, Any] = {}
    for name in (*names, *(name for name in required if name not in names)):
        schema = _all_of([_argument_schema(piece, name) for piece in pieces])
        if schema is False and name in required and (is_strict or name in names):
            return None
        if schema is not False or name in required:
            properties[name] = schema or True
    limits = [piece["maxProperties"] for piece in pieces if "maxProperties" in piece]
    return Shape(
        properties=properties,
        required=frozenset(required),
        patterns=patterns,
        others=others,
        min_arguments=max((piece.get("minProperties", 0) for piece in pieces), default=0),
        max_arguments=min(limits, default=None),
    )


def _argument_schema(piece: Piece, name: str) -> Any:
    """Return the schema of an argument in a piece."""
    if name in piece.get("properties", {}):
        return piece["properties"][name]
    if piece.get("patternProperties"):
        return {"anyOf": [*piece["patternProperties"].values()]}
    return piece.get("additionalProperties", True)


def _all_of(schemas: Sequence[Any]) -> Any:
    """Combine schemas that a value must all match."""
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
    speaking: Sequence[Piece],
) -> None:
    """Raise ``UnsupportedSchemaError`` for keywords that a ``Shape`` cannot express."""
    has_patterns = any(piece.get("patternProperties") for piece in pieces)
    if has_patterns and (names or len(speaking) > 1):
        raise UnsupportedSchemaError("patternProperties is not supported together with properties")
    for piece in pieces:
        if allowed_values(piece) is not None:
            raise UnsupportedSchemaError("enum and const of the whole arguments are not supported")
