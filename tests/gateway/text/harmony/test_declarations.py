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
        ({"type": ["array", "null"], "items": {"type": "string"}}, "x?: string[] | null,"),
        ({"type": ["string", "array"], "items": {"type": "string"}}, "x?: string | string[],"),
        ({"type": ["array", "array"], "items": {}}, "x?: any[],"),
        ({"type": "string", "items": {"type": "string"}}, "x?: string,"),
        ({"type": "null", "properties": {"y": {}}}, "x?: null,"),
        ({"type": ["object", "null"]}, "x?: object | null,"),
        (
            {"type": ["object", "null"], "properties": {"y": {}}},
            "x?: {\n    y?: any,\n    } | null,",
        ),
        ({"items": {}, "nullable": True}, "x?: any[] | null,"),
        ({"type": ["string", "null"], "nullable": True}, "x?: string | null,"),
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


def test_variants_of_an_object_leave_its_properties() -> None:
    """They say which of the properties go together."""
    for name in ("anyOf", "oneOf"):
        schema = {"properties": {"y": {"type": "string"}}, name: [{"required": ["y"]}]}
        assert "x?: {\n    y?: string,\n    }," in declared(**schema)
        text = declare_functions([{"function": {"name": "f", "parameters": schema}}])
        assert "type f = (_: {\ny?: string,\n}) => any;" in text


def with_definitions(schema: dict[str, Any], **definitions: Any) -> str:
    """How a function with one argument ``x`` is declared, by definitions of its schema."""
    parameters = {"properties": {"x": schema}, "$defs": definitions}
    text = declare_functions([{"function": {"name": "f", "parameters": parameters}}])
    return text.partition("(_: {\n")[2].partition("\n}) =>")[0]


def test_references_are_resolved() -> None:
    y = {"$ref": "#/$defs/y"}
    text, number = {"type": "string", "description": "A y"}, {"type": "number"}
    assert with_definitions(y, y=text) == "// A y\nx?: string,"
    assert with_definitions({**y, "description": "An x"}, y=text) == "// An x\nx?: string,"
    assert with_definitions({"type": "array", "items": y}, y=number) == "x?: number[],"
    assert with_definitions({"anyOf": [y, {"type": "null"}]}, y=number).count("\n | ") == 2
    assert with_definitions(y, y={"$ref": "#/$defs/a~1b"}, **{"a/b": number}) == "x?: number,"
    for other in ("#", "#/$defs/z", "#/$defs/y/type", "https://example.com", "", "y"):
        assert with_definitions({"$ref": other}, y=number) == "x?: any,"


def test_references_to_themselves_are_of_any_type() -> None:
    y = {"$ref": "#/$defs/y"}
    assert with_definitions(y, y=y) == "x?: any,"
    node = {"properties": {"next": y, "all": {"type": "array", "items": y}}}
    expected = "x?: {\n    next?: any,\n    all?: any[],\n    },"
    assert with_definitions(y, y=node) == expected


def test_deep_schemas_are_declared_once() -> None:
    """Each part is, so that a declaration is about as long as its schema."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(30):
        schema = {"type": ["array", "null"], "items": schema, "nullable": True}
    assert declared(**schema).count(" | null") == 30
    for _ in range(30):
        schema = {"type": ["object", "array", "null"], "items": {}, "properties": {"y": schema}}
    assert len(declared(**schema)) < 20_000
    schema = {"type": "string"}
    for _ in range(30):
        schema = {"type": ["array", "object"], "items": schema, "properties": {}}
    assert declared(**schema).count("object") == 30


def test_definitions_that_repeat_each_other_are_bounded() -> None:
    refs = [{"$ref": f"#/$defs/d{n}"} for n in range(30)]
    pairs = {f"d{n}": {"properties": {"a": refs[n + 1], "b": refs[n + 1]}} for n in range(29)}
    assert len(with_definitions(refs[0], **pairs)) < 1_000_000


@pytest.mark.parametrize(
    "schema",
    [
        {"type": {}},
        {"type": 1},
        {"oneOf": 1, "enum": "a", "required": 2, "examples": 3},
        {"properties": 4},
        {"type": [{}, 1]},
        {"$ref": {}},
        {"properties": {"y": True}, "required": None},
        {"items": [{}], "description": 5, "title": {}},
    ],
)
def test_a_wrong_schema_is_declared_without_its_wrong_parts(schema: dict[str, Any]) -> None:
    """The grammar that is made of the schema has the same error."""
    assert "x?: " in declared(**schema)


class _Name(str):
    """A name that counts its comparisons."""

    __slots__ = ()
    num_compared = 0

    def __eq__(self, other: object) -> bool:
        _Name.num_compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_required_names_are_compared_in_linear_time() -> None:
    """A schema of 1 MB would otherwise take a minute."""
    names = [_Name(f"p{n}") for n in range(300)]
    schema = {"type": "object", "properties": {key: {} for key in names}, "required": names[1:]}
    text = declare_functions([{"function": {"name": "f", "parameters": schema}}])
    assert "p0?: any,\np1: any,\n" in text
    assert _Name.num_compared < 3 * len(names)
