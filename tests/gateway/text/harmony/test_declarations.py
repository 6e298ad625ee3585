"""Functions in the manner of TypeScript, to the letter of the format's examples."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.text.harmony.declarations import declare_functions
from tests.gateway.text.harmony.examples import FUNCTIONS, WEATHER_TOOLS

SINK = {
    "name": "kitchensink",
    "description": "A function with various complex schemas.",
    "parameters": {
        "description": "params object",
        "type": "object",
        "properties": {
            "string": {
                "type": "string",
                "title": "STRING",
                "description": "A string",
                "examples": ["hello", "world"],
            },
            "string_nullable": {
                "type": "string",
                "nullable": True,
                "description": "A nullable string",
                "default": "the default",
            },
            "string_enum": {"type": "string", "enum": ["a", "b", "c"]},
            "oneof_string_or_number": {
                "oneOf": [
                    {"type": "string", "default": "default_string_in_oneof"},
                    {"type": "number", "description": "numbers can happen too"},
                ],
                "description": "a oneof",
                "default": 20,
            },
        },
    },
}
DECLARED_SINK = """\
// A function with various complex schemas.
type kitchensink = (_: // params object
{
// STRING
//
// A string
// Examples:
// - "hello"
// - "world"
string?: string,
// A nullable string
string_nullable?: string | null, // default: "the default"
string_enum?: "a" | "b" | "c",
// a oneof
// default: 20
oneof_string_or_number?:
 | string // default: "default_string_in_oneof"
 | number // numbers can happen too
,
}) => any;
"""
"""Source: test_render_functions_with_parameters in the tests of openai/harmony."""
LOOKUP = {
    "name": "lookup_weather",
    "description": "Use this tool to lookup the weather in a given location. Call it with the "
    "parameter 'location', can be any textual description of a location.",
    "parameters": {
        "type": "object",
        "properties": {"location": {"type": "string"}},
        "required": ["location"],
    },
}
DECLARED_LOOKUP = """\
# Tools

## functions

namespace functions {

// Use this tool to lookup the weather in a given location. Call it with the parameter 'location', \
can be any textual description of a location.
type lookup_weather = (_: {
location: string,
}) => any;

} // namespace functions"""
"""Source: test_browser_and_function_tool, likewise."""


def declared(**schema: Any) -> str:
    """How a function with one argument ``x`` is declared."""
    parameters = {"type": "object", "properties": {"x": schema}}
    text = declare_functions([{"function": {"name": "f", "parameters": parameters}}])
    return text.partition("{\n\n")[2].partition("\n\n}")[0]


def test_functions_are_declared_as_documented() -> None:
    assert declare_functions(WEATHER_TOOLS) == FUNCTIONS
    assert declare_functions([{"function": LOOKUP}]) == DECLARED_LOOKUP
    text = declare_functions([*WEATHER_TOOLS, {"function": SINK}])
    head, tail = FUNCTIONS.rsplit("}", 1)
    assert text == f"{head}{DECLARED_SINK}\n}}{tail}"


@pytest.mark.parametrize(
    ("schema", "line"),
    [
        ({"type": "integer", "default": -1}, "x?: number, // default: -1"),
        ({"type": "boolean", "default": False}, "x?: boolean, // default: false"),
        ({"type": ["number", "string"]}, "x?: number | string,"),
        ({"type": ["integer", "number", "null"]}, "x?: number | null,"),
        ({"type": "string", "const": "a"}, 'x?: "a",'),
        ({"enum": [1, None]}, "x?: 1 | null,"),
        ({"type": "array"}, "x?: Array<any>,"),
        ({"type": "array", "items": {"type": "array", "items": {}}}, "x?: any[][],"),
        ({"type": "array", "items": {"enum": ["a", "b"]}}, 'x?: ("a" | "b")[],'),
        ({"type": "object"}, "x?: object,"),
        ({"$ref": "#/$defs/y"}, "x?: any,"),
    ],
)
def test_each_type_has_its_name(schema: dict[str, Any], line: str) -> None:
    assert declared(**schema) == f"type f = (_: {{\n{line}\n}}) => any;"


def test_objects_in_objects_have_all_their_comments() -> None:
    inner = {"type": "object", "properties": {"y": {"type": "string", "description": "One\ntwo"}}}
    expected = (
        "type f = (_: {\n// An object\nx?: {\n    // One\n    // two\n    y?: string,\n    },"
    )
    assert declared(**inner, description="An object") == f"{expected}\n}}) => any;"
    items = {**inner, "description": "An item"}
    assert "x?: // An item\n{\n    // One" in declared(type="array", items=items)


def test_choices_are_lines_with_their_notes() -> None:
    choices = [
        {"type": "string", "description": "same"},
        {"type": "null", "description": "no\none"},
    ]
    expected = "type f = (_: {\n// same\nx?:\n | string\n | null // no one\n,\n}) => any;"
    assert declared(anyOf=choices, description="same") == expected


@pytest.mark.parametrize(
    "schema",
    [
        {"type": {}},
        {"type": 1},
        {"oneOf": 1, "enum": "a", "required": 2, "examples": 3},
        {"properties": 4},
        {"properties": {"y": True}, "required": None},
        {"items": [{}], "description": 5, "title": {}},
    ],
)
def test_a_wrong_schema_is_declared_without_its_wrong_parts(schema: dict[str, Any]) -> None:
    """Its error is that of the grammar that is made of it."""
    assert "x?: " in declared(**schema)
