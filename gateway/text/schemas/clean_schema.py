"""Cleans schemas of tool arguments for grammars: resolves references, keeps supported keywords.

Clients send schemas with annotations, custom formats, keywords of other drafts and references of
every kind. With ``strict``, a keyword that a grammar cannot express is rejected by name; without
``strict`` it is ignored, so that the request succeeds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from cluster.core.errors import RequestError
from gateway.core.tool_use import Tool
from gateway.text.schemas.formats import is_known_format
from gateway.text.schemas.references import (
    MAX_LEVELS,
    MAX_SCHEMA_DEPTH,
    References,
    ReferenceTarget,
    base_of,
    inner_schemas,
    is_too_deep,
)

TYPES = ("null", "boolean", "number", "integer", "string", "array", "object")
DEFINITION = "#/$defs/"
"""Prefix of every reference in a clean schema (with only keywords that grammars support)."""
_MAX_NODES = 10_000
"""Maximum number of schemas in a client's schema; targets of references are counted separately."""
_MAX_VALUES = 5000
"""Maximum number of values of an ``enum`` in a schema."""
_UNSUPPORTED = frozenset(
    {
        *("not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems"),
        *("propertyNames", "dependencies", "dependentRequired", "dependentSchemas"),
        *("unevaluatedItems", "unevaluatedProperties", "$dynamicRef", "$recursiveRef"),
    }
)
"""JSON Schema keywords that constrain values in ways that grammars cannot express."""
_NAMING = frozenset({"then", "else", "dependencies", "dependentSchemas"})
"""Unsupported JSON Schema keywords whose schemas may name additional arguments."""
_OPENING = frozenset(
    {"additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref"}
)
"""JSON Schema keywords that may allow arguments in addition to ``properties``."""
_NEUTRAL: Mapping[str, Any] = MappingProxyType(
    {
        "uniqueItems": False,
        "unevaluatedItems": True,
        "unevaluatedProperties": True,
        "propertyNames": {"type": "string"},
    }
)
"""Values of unsupported JSON Schema keywords that have no effect, by keyword."""
_NOT_REGULAR = re.compile(r"\(\?(?:=|!|<=|<!|>)|\\[1-9kbBG]")
"""Matches look-around, atomic groups, back-references and word boundaries in a schema's pattern."""
_LOWER_BOUNDS = ("minimum", "exclusiveMinimum")
BOUNDS = (*_LOWER_BOUNDS, "maximum", "exclusiveMaximum")
_HIGHEST = 2**63 - 1024
"""Largest float64 within the int64 range; the grammar compiler reads bounds as float64."""
_ANY = MappingProxyType[str, Any]({})


class _InvalidValueError(Exception):
    """Raised if the value of a schema's keyword is invalid. The message is the violated rule."""


@dataclass(frozen=True, slots=True)
class CleanSchema:
    """Schema of a function's arguments that has only keywords that grammars support."""

    root: Mapping[str, Any]
    definitions: Mapping[str, Any]
    """Target schemas of references, by the text after ``#/$defs/`` in the reference."""

    def document(self, schema: Any) -> dict[str, Any]:
        """Return ``schema``, a part of this schema, with the definitions that it refers to."""
        if not isinstance(schema, Mapping):
            return {} if schema else {"not": {}}
        needed: dict[str, Any] = {}
        waiting = [schema]
        while waiting:
            for name in _references_in(waiting.pop()):
                if name not in needed:
                    needed[name] = self.definitions[name]
                    waiting.append(needed[name])
        return {**schema, "$defs": needed} if needed else dict(schema)

    def resolve(self, schema: Any) -> Any:
        """Return the final target if ``schema`` is only a reference, else ``schema``."""
        for _ in range(len(self.definitions)):
            if not isinstance(schema, Mapping) or list(schema) != ["$ref"]:
                break
            schema = self.definitions[schema["$ref"].removeprefix(DEFINITION)]
        return schema


def forbid_additional(schema: Any) -> Mapping[str, Any]:
    """Return a schema of arguments that forbids additional ones, unless a keyword may allow them.

    JSON Schema allows additional properties by default, which small models may then generate
    endlessly. Arguments that are named only in ``required`` may be of any type.
    """
    if not isinstance(schema, Mapping):
        return _ANY
    if "properties" not in schema or not _OPENING.isdisjoint(schema):
        return schema
    named = schema["properties"]
    others: dict[str, Any] = {name: {} for name in schema.get("required", ()) if name not in named}
    properties = {**named, **others}
    return {**schema, "properties": properties, "additionalProperties": False}


def clean_schema(tool: Tool, is_strict: bool) -> CleanSchema:
    """Return the schema of a tool's arguments with only keywords that grammars support.

    Args:
        tool: the tool of the client.
        is_strict: whether to reject keywords that a grammar cannot express.

    Raises:
        RequestError: ``is_strict``, and a grammar cannot express the schema.
    """
    cleaner = _Cleaner(tool, is_strict)
    if is_too_deep(cleaner.references):
        if is_strict:
            rule = f"is too large or nested too deeply through $ref: at most {MAX_LEVELS} levels"
            raise unsupported_schema(tool, (), rule)
        return CleanSchema({}, {})
    return cleaner.clean()


def unsupported_schema(tool: Tool, path: Sequence[str], rule: str) -> RequestError:
    """Make the error for a strict tool whose schema a grammar cannot express.

    ``path`` leads to the unsupported keyword; empty for the whole schema.
    """
    location = ".".join(path) or "the schema"
    return RequestError(
        f"{tool.path} of {tool.name!r}: {location} {rule} (strict is true)", tool.path
    )


@dataclass(slots=True)
class _Cleaner:
    tool: Tool
    is_strict: bool
    references: References = field(init=False)
    _targets: list[ReferenceTarget] = field(default_factory=list)
    _numbers: dict[int, int] = field(default_factory=dict)
    _num_nodes: int = 0

    def __post_init__(self) -> None:
        parameters = self.tool.parameters
        self.references = References({"properties": {}} if parameters is None else parameters)

    def clean(self) -> CleanSchema:
        schema = self.references.root
        root = self._schema(schema, schema, (), 0)
        definitions: dict[str, Any] = {}
        while len(definitions) < len(self._targets):
            number = len(definitions)
            target = self._targets[number]
            definitions[str(number)] = self._schema(target.schema, target.base, ("$ref",), 0)
        return CleanSchema(root if isinstance(root, Mapping) else {}, definitions)

    def _schema(
        self, schema: Any, base: Mapping[str, Any], path: tuple[str, ...], depth: int
    ) -> Any:
        """Return the clean form of ``schema``, which is a dict or a bool."""
        self._num_nodes += 1
        is_much = self._num_nodes > _MAX_NODES or depth > MAX_SCHEMA_DEPTH
        if is_much or not isinstance(schema, (Mapping, bool)):
            rule = "is nested too deeply or too large" if is_much else "must be a JSON schema"
            self._reject(path, rule)
            return True
        if isinstance(schema, bool):
            return schema
        if schema.get("not") == {}:  # no value fits, as zod writes it
            return False
        base = base_of(schema, base)

        def inner(value: Any, *steps: str) -> Any:
            return self._schema(value, base, (*path, *steps), depth + 1)

        clean: dict[str, Any] = {}
        for key, value in schema.items():
            try:
                self._keyword(key, value, clean, inner, path)
            except _InvalidValueError as err:
                self._reject((*path, key), str(err))
        if "$ref" in schema and isinstance(schema["$ref"], str):
            self._reference(schema["$ref"], base, clean, path)
        if schema.get("nullable") is True:
            return {"anyOf": [clean, {"type": "null"}]}
        return forbid_additional(clean) if schema is self.references.root else clean

    def _keyword(
        self,
        key: str,
        value: Any,
        schema: dict[str, Any],
        inner: Callable[..., Any],
        path: tuple[str, ...],
    ) -> None:
        if key in _UNSUPPORTED:
            if not (key in _NEUTRAL and value == _NEUTRAL[key]):
                self._reject((*path, key), "cannot be expressed as a grammar")
            if key in _NAMING:
                schema.setdefault("additionalProperties", True)
        elif key in _CONVERTERS:
            if (clean := _CONVERTERS[key](value)) is not None:
                schema[key] = clamp_bound(key, clean) if key in BOUNDS else clean
        elif key == "const":
            schema[key] = value
        elif key in ("properties", "patternProperties"):
            schema[key] = self._by_name(key, value, inner, path)
        elif key in ("allOf", "anyOf", "oneOf", "prefixItems"):
            schema[key] = self._list(key, value, inner)
        elif key == "items" and isinstance(value, list):
            schema["prefixItems"] = self._list(key, value, inner)
        elif key in ("items", "additionalProperties"):
            schema[key] = inner(value, key)
        elif key == "additionalItems":
            schema["items"] = inner(value, key)
        elif key == "$ref":
            schema[key] = value  # keeps the order of the keywords
            if not isinstance(value, str):
                del schema[key]
                raise _InvalidValueError("must be a string")

    def _by_name(
        self, key: str, value: Any, inner: Callable[..., Any], path: tuple[str, ...]
    ) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise _InvalidValueError("must be an object")
        schemas: dict[str, Any] = {}
        for name, one in value.items():
            if key == "patternProperties" and not is_regular_pattern(name):
                self._reject((*path, key, name), "must be a pattern that a grammar can express")
            else:
                schemas[name] = inner(one, key, name)
        return schemas

    def _list(self, key: str, value: Any, inner: Callable[..., Any]) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise _InvalidValueError("must be a list of schemas")
        return [inner(one, key, str(index)) for index, one in enumerate(value)]

    def _reference(
        self,
        reference: str,
        base: Mapping[str, Any],
        schema: dict[str, Any],
        path: tuple[str, ...],
    ) -> None:
        target = self._final_target(reference, base)
        if target is None:
            del schema["$ref"]
            self._reject(
                (*path, "$ref"), f"({reference[:64]!r}) must refer to a part of the schema"
            )
            return
        number = self._numbers.setdefault(id(target.schema), len(self._targets))
        if number == len(self._targets):
            self._targets.append(target)
        schema["$ref"] = f"{DEFINITION}{number}"

    def _final_target(self, reference: str, base: Mapping[str, Any]) -> ReferenceTarget | None:
        """Follow a chain of references to its final target; None without a target or in a cycle."""
        seen: set[int] = set()
        target = self.references.find(reference, base)
        while target is not None and id(target.schema) not in seen:
            seen.add(id(target.schema))
            schema = target.schema
            if not isinstance(schema, Mapping) or list(schema) != ["$ref"]:
                return target
            following = schema["$ref"]
            is_text = isinstance(following, str)
            target = self.references.find(following, target.base) if is_text else None
        return None

    def _reject(self, path: tuple[str, ...], rule: str) -> None:
        if self.is_strict:
            raise unsupported_schema(self.tool, path, rule)


def is_regular_pattern(pattern: object) -> bool:
    """Whether a schema's pattern is a regular expression that a finite automaton can match."""
    return isinstance(pattern, str) and _NOT_REGULAR.search(pattern) is None


def _references_in(schema: Any) -> list[str]:
    """Return the names of the definitions that a schema refers to."""
    names: list[str] = []
    waiting = [schema]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Mapping) and isinstance(reference := one.get("$ref"), str):
            names.append(reference.removeprefix(DEFINITION))
        waiting += inner_schemas(one, ("enum", "const"))
    return names


# ---- keywords without schemas in them --------------------------------------------------------


def _types(value: Any) -> str | list[str]:
    named = value if isinstance(value, list) else [value]
    if not named or not all(isinstance(one, str) and one in TYPES for one in named):
        raise _InvalidValueError(f"must be of {', '.join(TYPES)}")
    return named[0] if len(named) == 1 else list(dict.fromkeys(named))


def _count(value: Any) -> int:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or value != value // 1 or value < 0:
        raise _InvalidValueError("must be a whole number, at least 0")
    return int(value)


def _number(value: Any) -> int | float | bool:
    if not isinstance(value, (int, float)):
        raise _InvalidValueError("must be a number")
    return value


def clamp_bound(key: str, bound: Any) -> Any:
    """Limit a numeric bound to the int64 range, so that the grammar compiler accepts the bound. The
    bound moves only in the direction that allows fewer numbers."""
    if not isinstance(bound, (int, float)):
        return bound
    return max(bound, -_HIGHEST) if key in _LOWER_BOUNDS else min(bound, _HIGHEST)


def _factor(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise _InvalidValueError("must be a number above 0")
    return value


def _pattern(value: Any) -> str:
    if not is_regular_pattern(value):
        raise _InvalidValueError("must be a pattern that a grammar can express")
    return str(value)


def _names(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise _InvalidValueError("must be a list of names")
    return list(dict.fromkeys(value))


def _values(value: Any) -> list[Any]:
    if not isinstance(value, list) or not 0 < len(value) <= _MAX_VALUES:
        raise _InvalidValueError(f"must be a list of 1 to {_MAX_VALUES} values")
    return value


_CONVERTERS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        "type": _types,
        "enum": _values,
        "format": lambda value: value if is_known_format(value) else None,
        "pattern": _pattern,
        "required": _names,
        "multipleOf": _factor,
        **dict.fromkeys(BOUNDS, _number),
        **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), _count),
        **dict.fromkeys(("minProperties", "maxProperties"), _count),
    }
)
"""Functions that check and convert the value of a JSON Schema keyword, by keyword. The result None
removes the keyword."""
