"""JSON schemas of arguments: one kind of value at a time, references resolved.

What is read is bounded whatever a schema says: a reference to itself is of any type, and so is
what lies deeper than a schema may be, or repeats too much text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gateway.text.forms.structured import MAX_GRAMMAR_BYTES
from gateway.text.schemas.references import MAX_SCHEMA_DEPTH, References

ANY, NULL, ARRAY, OBJECT = "any", "null", "array", "object"


class Definitions:
    """What the references of one schema mean; only those into the schema itself are known."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._references = References(root)
        self._chars_left = MAX_GRAMMAR_BYTES
        """Of schemas that references may still repeat."""

    def find(self, reference: str) -> Mapping[str, Any] | None:
        """The schema at ``#/$defs/name``, for example; None where there is none, or no room."""
        target = self._references.find(reference)
        found = None if target is None else target.schema
        if not isinstance(found, Mapping) or self._chars_left <= 0:
            return None
        self._chars_left -= len(json.dumps(found))
        return found if self._chars_left >= 0 else None


@dataclass(frozen=True, slots=True)
class Schema:
    """A schema, or a part of one; what is wrong in it is as if it were not there."""

    data: Mapping[str, Any]
    definitions: Definitions
    references: tuple[str, ...] = ("#", "")
    """Those that lead here."""
    depth: int = 0

    @staticmethod
    def of(data: Mapping[str, Any]) -> Schema:
        """A whole schema."""
        return Schema(data, Definitions(data))._resolved()

    def get(self, name: str) -> Any:
        return self.data.get(name)

    def entries(self, name: str) -> list[Any]:
        """A list in the schema; empty where there is none."""
        found = self.data.get(name)
        return found if isinstance(found, list) else []

    @property
    def has_properties(self) -> bool:
        found = self.data.get("properties")
        return isinstance(found, Mapping) and bool(found)

    @property
    def has_variants(self) -> bool:
        return not self.has_properties and any(isinstance(v, Mapping) for v in self._variants)

    @property
    def properties(self) -> dict[str, Schema]:
        """By name; each reference in them is followed anew."""
        if not self.has_properties:
            return {}
        return {name: self._inner(value) for name, value in self.data["properties"].items()}

    @property
    def variants(self) -> list[Schema]:
        """Schemas of which a value follows one.

        An object with properties has none: its variants say which of them go together.
        """
        if not self.has_variants:
            return []
        return [self._inner(one) for one in self._variants if isinstance(one, Mapping)]

    @property
    def item(self) -> Schema | None:
        """What an array has; None: anything."""
        found = self.data.get("items")
        return self._inner(found) if isinstance(found, Mapping) else None

    @property
    def values(self) -> list[Any]:
        """The only values; empty where there are others."""
        return self.entries("enum") or ([self.data["const"]] if "const" in self.data else [])

    @property
    def kinds(self) -> list[str]:
        """Names of types, each once. A schema that has parts of one type only is of that type."""
        named = self.get("type")
        if isinstance(named, list):
            return list(dict.fromkeys(kind for kind in named if isinstance(kind, str)))
        if isinstance(named, str):
            return [named]
        if self.has_properties:
            return [OBJECT]
        return [ARRAY] if "items" in self.data else []

    @property
    def may_be_null(self) -> bool:
        """It says so beside its type."""
        return self.get("nullable") is True

    @property
    def _variants(self) -> list[Any]:
        return self.entries("oneOf") or self.entries("anyOf")

    def _inner(self, data: object) -> Schema:
        known = data if isinstance(data, Mapping) and self.depth < MAX_SCHEMA_DEPTH else {}
        return Schema(known, self.definitions, self.references, self.depth + 1)._resolved()

    def _resolved(self) -> Schema:
        """The schema that a reference names, with what stands beside the reference."""
        schema = self
        while isinstance(reference := schema.get("$ref"), str):
            beside = {name: value for name, value in schema.data.items() if name != "$ref"}
            is_new = reference not in schema.references
            found = schema.definitions.find(reference) if is_new else None
            references = (*schema.references, reference)
            data = {**(found or {}), **beside}
            schema = Schema(data, schema.definitions, references, schema.depth)
        return schema
