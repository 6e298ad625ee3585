"""Declarations of functions in Harmony prompts: a namespace in the syntax of TypeScript.

Source: "Harmony response format" (OpenAI, 2025), docs/format.md and the examples of functions in
test-data of https://github.com/openai/harmony. Unlike in that library, every line of a description
is a comment, ``anyOf`` is declared like ``oneOf``, references are resolved, and arrays of unions
have parentheses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gateway.text.tool_formats.resolved_schema import ANY, ARRAY, NULL, OBJECT, ResolvedSchema

_INDENT = " " * 4
_PLAIN = {"integer": "number"} | {n: n for n in ("string", "number", "boolean", NULL, OBJECT)}


def declare_functions(tools: Sequence[Mapping[str, Any]]) -> str:
    """Return the section ``# Tools`` of a developer message; ``tools`` has OpenAI's format."""
    lines = ["# Tools", "", "## functions", "", "namespace functions {", ""]
    for function in (tool["function"] for tool in tools):
        lines += comment(function.get("description"))
        arguments = _arguments(ResolvedSchema.from_root(function.get("parameters") or {}))
        lines += [f"type {function['name']} = ({arguments}) => any;", ""]
    return "\n".join([*lines, "} // namespace functions"])


def _arguments(schema: ResolvedSchema) -> str:
    """Return the TypeScript parameter list of a function; empty if it takes no arguments."""
    has_any = schema.has_properties or schema.has_variants
    return f"_: {_described(schema, _type(schema, ''))}" if has_any else ""


def _described(schema: ResolvedSchema, type_text: str) -> str:
    """Return ``type_text``, preceded by the schema's description if it has properties."""
    lines = comment(schema.get("description")) if schema.has_properties else []
    return "\n".join([*lines, type_text])


def _type(schema: ResolvedSchema, indent: str) -> str:
    return " | ".join(_choices(schema, indent))


def _choices(schema: ResolvedSchema, indent: str) -> list[str]:
    """Return the members of the union type of a schema, without duplicates; at least one."""
    if values := schema.values:
        types = [_json(value) for value in values]
    elif variants := schema.variants:
        types = [_type(variant, indent) for variant in variants]
    else:
        types = [_of_kind(kind, schema, indent) for kind in schema.types] or [ANY]
    return list(dict.fromkeys([*types, NULL] if schema.may_be_null else types))


def _of_kind(kind: str, schema: ResolvedSchema, indent: str) -> str:
    """Return the TypeScript type of values with the JSON type ``kind``."""
    if kind == ARRAY:
        return _array(schema, indent)
    if kind == OBJECT and schema.has_properties:
        return _object(schema, indent)
    return _PLAIN.get(kind, ANY)


def _array(schema: ResolvedSchema, indent: str) -> str:
    item = schema.item
    if item is None:
        return "Array<any>"
    choices = _choices(item, indent)
    item_type = _described(item, " | ".join(choices))
    return f"({item_type})[]" if len(choices) > 1 else f"{item_type}[]"


def _object(schema: ResolvedSchema, indent: str) -> str:
    required = {name for name in schema.entries("required") if isinstance(name, str)}
    lines = ["{"]
    for name, value in schema.properties.items():
        key = name if name in required else f"{name}?"
        lines += [f"{indent}{line}" for line in _property(key, value, indent)]
    return "\n".join([*lines, f"{indent}}}"])


def _property(key: str, schema: ResolvedSchema, indent: str) -> list[str]:
    """Return the lines that declare one property of an object, without indentation."""
    lines = [*comment(schema.get("title")), "//"] if schema.get("title") else []
    lines += comment(schema.get("description"))
    if examples := schema.entries("examples"):
        lines += ["// Examples:", *(f"// - {_json(example)}" for example in examples)]
    default = _default(schema)
    if schema.has_variants and not schema.values:
        types = [_variant(one, schema, indent) for one in schema.variants]
        types += [f" | {NULL}"] * schema.may_be_null
        above = [f"// {default}"] if default else []
        return [*lines, *above, f"{key}:", *types, ","]
    note = f" // {default}" if default else ""
    return [*lines, f"{key}: {_type(schema, indent + _INDENT)},{note}"]


def _variant(variant: ResolvedSchema, owner: ResolvedSchema, indent: str) -> str:
    description = str(variant.get("description") or "").replace("\n", " ")
    note_text = "" if description == owner.get("description") else description
    note = " ".join(filter(None, [note_text, _default(variant)]))
    return f" | {_type(variant, indent + _INDENT)}" + (f" // {note}" if note else "")


def _default(schema: ResolvedSchema) -> str:
    """Return a note with the schema's default value; empty without one. ``enum`` values are
    unquoted.
    """
    if "default" not in schema.data:
        return ""
    value = schema.data["default"]
    is_word = isinstance(value, str) and "enum" in schema.data
    return f"default: {value if is_word else _json(value)}"


def comment(text: object) -> list[str]:
    """Return the lines of a text as TypeScript comments; empty without a text."""
    return [f"// {line}".rstrip() for line in str(text).splitlines()] if text else []


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
