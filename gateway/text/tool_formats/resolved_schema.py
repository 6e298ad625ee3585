"""Reads JSON schemas of arguments for declarations, with references resolved.

The work is limited for every schema: recursive references, parts that are nested too deeply, and
references that repeat too much text count as schemas that allow any value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gateway.text.schemas.references import MAX_SCHEMA_DEPTH, References
from gateway.text.tool_formats.structured import MAX_GRAMMAR_BYTES

ANY, NULL, ARRAY, OBJECT = "any", "null", "array", "object"


class SchemaDefinitions:
    """Resolves references within one schema."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._references = References(root)
        self._chars_left = MAX_GRAMMAR_BYTES
        """Remaining number of characters that references may repeat."""

    def find(self, reference: str) -> Mapping[str, Any] | None:
        """Return the target of a reference; None if it is absent or beyond the size limit."""
        target = self._references.find(reference)
        schema = None if target is None else target.schema
        if not isinstance(schema, Mapping) or self._chars_left <= 0:
            return None
        self._chars_left -= len(json.dumps(schema))
        return schema if self._chars_left >= 0 else None


@dataclass(frozen=True, slots=True)
class ResolvedSchema:
    """A schema, or a part of a schema. Invalid keywords are ignored."""

    data: Mapping[str, Any]
    definitions: SchemaDefinitions
    references: tuple[str, ...] = ("#", "")
    """References that were followed to reach this schema."""
    depth: int = 0

    @staticmethod
    def from_root(data: Mapping[str, Any]) -> ResolvedSchema:
        return ResolvedSchema(data, SchemaDefinitions(data))._resolved()

    def get(self, name: str) -> Any:
        return self.data.get(name)

    def entries(self, name: str) -> list[Any]:
        """Return the list at the keyword ``name``; empty without a list."""
        value = self.data.get(name)
        return value if isinstance(value, list) else []

    @property
    def has_properties(self) -> bool:
        properties = self.data.get("properties")
        return isinstance(properties, Mapping) and bool(properties)

    @property
    def has_variants(self) -> bool:
        return not self.has_properties and any(isinstance(v, Mapping) for v in self._variants)

    @property
    def properties(self) -> dict[str, ResolvedSchema]:
        """Properties by name, with references resolved."""
        if not self.has_properties:
            return {}
        return {name: self._inner(value) for name, value in self.data["properties"].items()}

    @property
    def variants(self) -> list[ResolvedSchema]:
        """Alternative schemas, one of which a value must match.

        Empty for an object with properties: its variants only combine properties.
        """
        if not self.has_variants:
            return []
        return [self._inner(one) for one in self._variants if isinstance(one, Mapping)]

    @property
    def item(self) -> ResolvedSchema | None:
        """Schema of array items; None for any item."""
        items = self.data.get("items")
        return self._inner(items) if isinstance(items, Mapping) else None

    @property
    def values(self) -> list[Any]:
        """Values of ``enum`` or ``const``; empty without them."""
        return self.entries("enum") or ([self.data["const"]] if "const" in self.data else [])

    @property
    def types(self) -> list[str]:
        """Distinct names of the types; if ``type`` is missing, inferred from other keywords."""
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
        return self.get("nullable") is True

    @property
    def _variants(self) -> list[Any]:
        return self.entries("oneOf") or self.entries("anyOf")

    def _inner(self, data: object) -> ResolvedSchema:
        schema = data if isinstance(data, Mapping) and self.depth < MAX_SCHEMA_DEPTH else {}
        return ResolvedSchema(schema, self.definitions, self.references, self.depth + 1)._resolved()

    def _resolved(self) -> ResolvedSchema:
        """Resolve ``$ref``; keywords next to the reference override the target."""
        schema = self
        while isinstance(reference := schema.get("$ref"), str):
            beside = {name: value for name, value in schema.data.items() if name != "$ref"}
            is_new = reference not in schema.references
            target = schema.definitions.find(reference) if is_new else None
            references = (*schema.references, reference)
            data = {**(target or {}), **beside}
            schema = ResolvedSchema(data, schema.definitions, references, schema.depth)
        return schema
