"""Replaces ``oneOf`` in JSON schemas by ``anyOf`` if its members are disjoint.

Members may be references: the grammar compiler itself detects disjoint members only without
references.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from gateway.core.tool_use import Tool
from gateway.text.schemas.alternatives import Traits, allowed_values
from gateway.text.schemas.clean_schema import BOUNDS, CleanSchema, clamp_bound, clean_schema
from gateway.text.schemas.references import BY_NAME, CONTENTS, References

_MAX_COMPARED = 400
"""Maximum number of pairs of ``oneOf`` members that are compared in one schema; members that a
tag distinguishes need no comparison. Beyond this number, ``oneOf`` is kept."""
_MAX_TAGS = 16
"""Maximum number of properties tried as the tag, which distinguishes members of a ``oneOf``."""
_MAX_STEPS = 64
"""Maximum length of a chain of references that is followed in a client's schema."""
Resolve = Callable[[Any], Any]
"""Type of a function that returns the target of a schema that is only a reference, and returns
other schemas unchanged."""


def replace_one_of(schema: Any, resolve: Resolve) -> Any:
    """Return a schema with ``anyOf`` for each ``oneOf`` with disjoint members.

    Bounds of numbers are clamped to the range of the grammar compiler.
    """
    return _Rewriter(resolve).rewrite(schema)


def argument_schema(tool: Tool, is_strict: bool) -> CleanSchema:
    """Return the schema of a tool's arguments with only keywords that grammars support.

    In schemas of strict tools, ``anyOf`` replaces each ``oneOf`` with disjoint members.
    """
    clean = clean_schema(tool, is_strict)
    if not is_strict:
        return clean
    root, definitions = (
        replace_one_of(one, clean.resolve) for one in (clean.root, {"$defs": clean.definitions})
    )
    return CleanSchema(root, definitions["$defs"])


def make_resolver(schema: Mapping[str, Any]) -> Resolve:
    """Return a function that resolves the references of a client's schema."""
    references = References(schema)

    def resolve(one: Any) -> Any:
        for _ in range(_MAX_STEPS):
            reference = one.get("$ref") if isinstance(one, Mapping) and len(one) == 1 else None
            target = references.find(reference) if isinstance(reference, str) else None
            if target is None:
                return one
            one = target.schema
        return one

    return resolve


@dataclass(slots=True)
class _Rewriter:
    resolve: Resolve
    _comparisons_left: int = _MAX_COMPARED

    def rewrite(self, schema: Any) -> Any:
        if isinstance(schema, list):
            return [self.rewrite(one) for one in schema]
        if not isinstance(schema, Mapping):
            return schema
        rewritten: dict[str, Any] = {}
        for key, value in schema.items():
            if key in BY_NAME and isinstance(value, Mapping):
                rewritten[key] = {name: self.rewrite(one) for name, one in value.items()}
            elif key in CONTENTS:
                rewritten[key] = value
            elif key in BOUNDS:
                rewritten[key] = clamp_bound(key, value)
            elif key == "oneOf" and "anyOf" not in schema and self._are_members_disjoint(value):
                rewritten["anyOf"] = self.rewrite(value)
            else:
                rewritten[key] = self.rewrite(value)
        return rewritten

    def _are_members_disjoint(self, members: Any) -> bool:
        if not isinstance(members, list) or not members:
            return False
        named = [self.resolve(member) for member in members]
        if len(set(map(id, named))) < len(named):
            return False
        pieces = list(map(_piece, named))
        if _have_tag(pieces):
            return True
        self._comparisons_left -= len(pieces) * (len(pieces) - 1) // 2
        if self._comparisons_left < 0:
            return False
        traits = [Traits.of((piece,)) for piece in pieces]
        return all(
            one.are_disjoint_from(other)
            for index, one in enumerate(traits)
            for other in traits[:index]
        )


def _have_tag(pieces: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all members are objects with a tag: a required property whose texts all differ."""
    if any(list(piece.get("type", ())) != ["object"] for piece in pieces):
        return False
    for name in islice(pieces[0].get("required", ()), _MAX_TAGS):
        each = [_texts(piece, name) for piece in pieces]
        if all(each) and len(set[str]().union(*each)) == sum(map(len, each)):
            return True
    return False


def _texts(piece: Mapping[str, Any], name: str) -> frozenset[str]:
    """Return the allowed values of a required property if all are texts, else an empty set."""
    if name not in piece.get("required", ()):
        return frozenset()
    values = allowed_values(piece["properties"].get(name, {})) or []
    return frozenset(values if all(isinstance(value, str) for value in values) else ())


def _piece(schema: Any) -> dict[str, Any]:
    if not isinstance(schema, Mapping):
        return {}
    return {**_limits(schema), "properties": _properties(schema)}


def _properties(schema: Mapping[str, Any]) -> dict[str, Any]:
    properties = schema.get("properties")
    if not isinstance(properties, Mapping):
        return {}
    return {n: _limits(one) if isinstance(one, Mapping) else {} for n, one in properties.items()}


def _limits(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the valid keywords that may distinguish a schema from other ``oneOf`` members."""
    limits = {"const": schema["const"]} if "const" in schema else {}
    if isinstance(values := schema.get("enum"), list):
        limits["enum"] = values
    for key in ("type", "required"):
        value = schema.get(key)
        names = [value] if key == "type" and isinstance(value, str) else value
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            limits[key] = dict.fromkeys(names)
    if schema.get("additionalProperties") is False and not schema.get("patternProperties"):
        limits["additionalProperties"] = False
    return limits
