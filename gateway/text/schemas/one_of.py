"""``oneOf`` as ``anyOf`` where no value fits two of its members, which may be references.

The compiler of grammars sees that members are apart only where it needs to follow no reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from gateway.core.tool_use import Tool
from gateway.text.schemas.alternatives import are_apart, values_of
from gateway.text.schemas.clean_schema import BOUNDS, CleanSchema, clean_schema, within_range
from gateway.text.schemas.references import BY_NAME, CONTENTS, References

_MAX_COMPARED = 400
"""Pairs of members without a tag in a schema; a ``oneOf`` with further ones is left as it is."""
_MAX_TAGS = 16
"""Required properties of which one may be the tag."""
_MAX_STEPS = 64
"""References that only name another one."""
Resolve = Callable[[Any], Any]
"""From a schema to the one that it names, if it is nothing but a reference."""


def with_any_of(schema: Any, resolve: Resolve) -> Any:
    """The same schema, in which members that are apart need not be compared again, and bounds are
    such as the compiler takes."""
    return _Rewriting(resolve).of(schema)


def argument_schema(tool: Tool, is_strict: bool) -> CleanSchema:
    """As ``clean_schema`` finds it, as far as a compiler that refuses what it does not follow can
    follow it."""
    clean = clean_schema(tool, is_strict)
    if not is_strict:
        return clean
    root, definitions = (
        with_any_of(one, clean.resolved) for one in (clean.root, {"$defs": clean.definitions})
    )
    return CleanSchema(root, definitions["$defs"])


def resolver(schema: Mapping[str, Any]) -> Resolve:
    """References of a schema as a client sends it."""
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
class _Rewriting:
    resolve: Resolve
    _num_left: int = _MAX_COMPARED

    def of(self, schema: Any) -> Any:
        if isinstance(schema, list):
            return [self.of(one) for one in schema]
        if not isinstance(schema, Mapping):
            return schema
        found: dict[str, Any] = {}
        for key, value in schema.items():
            if key in BY_NAME and isinstance(value, Mapping):
                found[key] = {name: self.of(one) for name, one in value.items()}
            elif key in CONTENTS:
                found[key] = value
            elif key in BOUNDS:
                found[key] = within_range(key, value)
            elif key == "oneOf" and "anyOf" not in schema and self._is_apart(value):
                found["anyOf"] = self.of(value)
            else:
                found[key] = self.of(value)
        return found

    def _is_apart(self, members: Any) -> bool:
        if not isinstance(members, list) or not members:
            return False
        named = [self.resolve(member) for member in members]
        if len(set(map(id, named))) < len(named):
            return False
        pieces = list(map(_piece, named))
        if _have_tag(pieces):
            return True
        self._num_left -= len(pieces) * (len(pieces) - 1) // 2
        return self._num_left >= 0 and all(
            are_apart((one,), (other,))
            for place, one in enumerate(pieces)
            for other in pieces[:place]
        )


def _have_tag(pieces: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all are objects with a property whose values, texts, tell them apart."""
    if any(list(piece.get("type", ())) != ["object"] for piece in pieces):
        return False
    for name in islice(pieces[0].get("required", ()), _MAX_TAGS):
        each = [_texts(piece, name) for piece in pieces]
        if all(each) and len(set[str]().union(*each)) == sum(map(len, each)):
            return True
    return False


def _texts(piece: Mapping[str, Any], name: str) -> frozenset[str]:
    """The only values of a required property, if they are texts."""
    if name not in piece.get("required", ()):
        return frozenset()
    values = values_of(piece["properties"].get(name, {})) or []
    return frozenset(values if all(isinstance(value, str) for value in values) else ())


def _piece(schema: Any) -> dict[str, Any]:
    if not isinstance(schema, Mapping):
        return {}
    return {**_limits(schema), "properties": _properties(schema)}


def _properties(schema: Mapping[str, Any]) -> dict[str, Any]:
    found = schema.get("properties")
    if not isinstance(found, Mapping):
        return {}
    return {n: _limits(one) if isinstance(one, Mapping) else {} for n, one in found.items()}


def _limits(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords that tell members apart, where their values are such as JSON Schema has them."""
    found = {"const": schema["const"]} if "const" in schema else {}
    if isinstance(values := schema.get("enum"), list):
        found["enum"] = values
    for key in ("type", "required"):
        value = schema.get(key)
        names = [value] if key == "type" and isinstance(value, str) else value
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            found[key] = dict.fromkeys(names)
    if schema.get("additionalProperties") is False and not schema.get("patternProperties"):
        found["additionalProperties"] = False
    return found
