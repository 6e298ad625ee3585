"""Reads JSON schemas of function arguments for declarations in prompts, with references resolved.

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
    """Finds the targets of references within one JSON schema, up to a size limit."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._references = References(root)
        self._chars_left = MAX_GRAMMAR_BYTES
        """Number of characters of JSON that all targets of further references may have together."""

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
    """A JSON schema, or a part of one, with ``$ref`` resolved. Invalid keywords are ignored."""

    data: Mapping[str, Any]
    definitions: SchemaDefinitions
    references: tuple[str, ...] = ("#", "")
    """References that were followed from the root to this schema."""
    depth: int = 0

    @staticmethod
    def from_root(data: Mapping[str, Any]) -> ResolvedSchema:
        return ResolvedSchema(data, SchemaDefinitions(data))._resolved()

    def get(self, name: str) -> Any:
        return self.data.get(name)

    def entries(self, name: str) -> list[Any]:
        """Return the list value of the keyword ``name``; empty if the value is not a list."""
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

        Empty for an object with properties: its variants only tell which may occur together.
        """
        if not self.has_variants:
            return []
        return [self._inner(one) for one in self._variants if isinstance(one, Mapping)]

    @property
    def item(self) -> ResolvedSchema | None:
        """Schema of the array's items; None if any item is allowed."""
        items = self.data.get("items")
        return self._inner(items) if isinstance(items, Mapping) else None

    @property
    def values(self) -> list[Any]:
        """Allowed values of ``enum`` or ``const``; empty without these keywords."""
        return self.entries("enum") or ([self.data["const"]] if "const" in self.data else [])

    @property
    def types(self) -> list[str]:
        """Distinct JSON types; without the keyword ``type``, inferred from other keywords."""
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
        """Return this schema with ``$ref`` resolved; keywords beside it override the target."""
        schema = self
        while isinstance(reference := schema.get("$ref"), str):
            beside = {name: value for name, value in schema.data.items() if name != "$ref"}
            is_new = reference not in schema.references
            target = schema.definitions.find(reference) if is_new else None
            references = (*schema.references, reference)
            data = {**(target or {}), **beside}
            schema = ResolvedSchema(data, schema.definitions, references, schema.depth)
        return schema
