"""Functions as Harmony prompts declare them: a namespace in the manner of TypeScript.

Source: "Harmony response format" (OpenAI, 2025), docs/format.md and the examples of functions in
test-data of https://github.com/openai/harmony. Unlike the library there, every line of a
description is a comment, ``anyOf`` is declared as ``oneOf`` is, and lists of choices have
parentheses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_Schema = Mapping[str, Any]
_INDENT = " " * 4
_PLAIN = {"integer": "number"} | {n: n for n in ("string", "number", "boolean", "null", "object")}


def declare_functions(tools: Sequence[Mapping[str, Any]]) -> str:
    """The section ``# Tools`` of a developer message; ``tools`` are in OpenAI's form."""
    lines = ["# Tools", "", "## functions", "", "namespace functions {", ""]
    for function in (tool["function"] for tool in tools):
        lines += _comment(function.get("description"))
        arguments = _arguments(function.get("parameters") or {})
        lines += [f"type {function['name']} = ({arguments}) => any;", ""]
    return "\n".join([*lines, "} // namespace functions"])


def _arguments(schema: _Schema) -> str:
    """What stands between the parentheses; nothing where a function takes no arguments."""
    has_any = bool(_properties(schema) or _variants(schema))
    return f"_: {_described_type(schema, '')}" if has_any else ""


def _described_type(schema: _Schema, indent: str) -> str:
    """A type, below the description of an object."""
    lines = _comment(schema.get("description")) if _properties(schema) else []
    return "\n".join([*lines, _type(schema, indent)])


def _type(schema: _Schema, indent: str) -> str:
    if choices := _choices(schema, indent):
        return " | ".join(dict.fromkeys(choices))
    if schema.get("type") == "array" or "items" in schema:
        return _array(schema, indent)
    if _properties(schema):
        return _object(schema, indent)
    return _PLAIN.get(str(schema.get("type")), "any")


def _choices(schema: _Schema, indent: str) -> list[str]:
    """The types of which a value has one; empty where the schema names one type."""
    if values := _entries(schema, "enum") or ([schema["const"]] if "const" in schema else []):
        types = [_json(value) for value in values]
    elif variants := _variants(schema):
        types = [_type(variant, indent) for variant in variants]
    elif kinds := _entries(schema, "type"):
        types = [_type({**schema, "type": kind}, indent) for kind in kinds]
    else:
        types = []
    if schema.get("nullable") is True:
        types = types or [_type({**schema, "nullable": False}, indent)]
        return [*types, "null"]
    return types


def _variants(schema: _Schema) -> list[_Schema]:
    found = _entries(schema, "oneOf") or _entries(schema, "anyOf")
    return [variant for variant in found if isinstance(variant, Mapping)]


def _entries(schema: _Schema, name: str) -> list[Any]:
    """A list in a schema; empty where there is none, as in a schema that is wrong."""
    found = schema.get(name)
    return found if isinstance(found, list) else []


def _properties(schema: _Schema) -> Mapping[str, Any]:
    found = schema.get("properties")
    return found if isinstance(found, Mapping) else {}


def _array(schema: _Schema, indent: str) -> str:
    items = schema.get("items")
    if not isinstance(items, Mapping):
        return "Array<any>"
    item = _described_type(items, indent)
    return f"({item})[]" if len(_choices(items, indent)) > 1 else f"{item}[]"


def _object(schema: _Schema, indent: str) -> str:
    required = _entries(schema, "required")
    lines = ["{"]
    for name, value in _properties(schema).items():
        key = name if name in required else f"{name}?"
        inner = value if isinstance(value, Mapping) else {}
        lines += [f"{indent}{line}" for line in _property(key, inner, indent)]
    return "\n".join([*lines, f"{indent}}}"])


def _property(key: str, schema: _Schema, indent: str) -> list[str]:
    """The lines of one property, without the indent of their beginnings."""
    lines = [*_comment(schema["title"]), "//"] if schema.get("title") else []
    lines += _comment(schema.get("description"))
    if examples := _entries(schema, "examples"):
        lines += ["// Examples:", *(f"// - {_json(example)}" for example in examples)]
    default = _default(schema)
    if variants := _variants(schema):
        types = (_variant(one, schema, indent) for one in variants)
        above = [f"// {default}"] if default else []
        return [*lines, *above, f"{key}:", *types, ","]
    note = f" // {default}" if default else ""
    return [*lines, f"{key}: {_type(schema, indent + _INDENT)},{note}"]


def _variant(variant: _Schema, owner: _Schema, indent: str) -> str:
    description = str(variant.get("description") or "").replace("\n", " ")
    shown = "" if description == owner.get("description") else description
    note = " ".join(filter(None, [shown, _default(variant)]))
    return f" | {_type(variant, indent + _INDENT)}" + (f" // {note}" if note else "")


def _default(schema: _Schema) -> str:
    """A note of the default; empty without one. A choice of an ``enum`` has no quotes."""
    if "default" not in schema:
        return ""
    value = schema["default"]
    is_word = isinstance(value, str) and "enum" in schema
    return f"default: {value if is_word else _json(value)}"


def _comment(text: object) -> list[str]:
    return [f"// {line}".rstrip() for line in str(text).splitlines()] if text else []


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
