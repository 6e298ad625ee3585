"""Structured output as clients ask for it: every form, and every kind of rubbish."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.core.errors import RequestError, UnsupportedParameterError
from gateway.http.convert import completion_call
from gateway.http.parse import parse_body
from gateway.http.schema import CompletionBody
from gateway.http.unsupported import check_unsupported
from gateway.text.schemas.references import MAX_SCHEMA_DEPTH
from gateway.text.tool_formats import structured
from gateway.text.tool_formats.structured import MAX_GRAMMAR_BYTES, make_grammar
from workers.requests.request import Grammar, GrammarKind

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"const": "é"}}}


def grammar_of(**fields: Any) -> Grammar | None:
    """What a completion with these fields asks for."""
    data = {"prompt": "x", **fields}
    check_unsupported(data, "completion")
    return completion_call(parse_body(CompletionBody, data)).grammar


def nested(depth: int) -> dict[str, Any]:
    """A schema of so many levels."""
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"structured_outputs": {"regex": "a|b"}}, GrammarKind.REGEX, "a|b"),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, GrammarKind.LARK, 'start: "a"'),
        ({"structured_outputs": {"choice": ["é", ""]}}, GrammarKind.CHOICE, '["é", ""]'),
        (
            {"structured_outputs": {"json_object": True}},
            GrammarKind.JSON_SCHEMA,
            '{"type":"object"}',
        ),
        ({"structured_outputs": {"json": {}}}, GrammarKind.JSON_SCHEMA, "{}"),
        (
            {"response_format": {"type": "json_object"}},
            GrammarKind.JSON_SCHEMA,
            '{"type":"object"}',
        ),
    ],
)
def test_every_form(fields: dict[str, Any], kind: GrammarKind, text: str) -> None:
    grammar = grammar_of(**fields)
    assert grammar is not None
    assert (grammar.kind, grammar.text) == (kind, text)
    assert grammar.field.startswith(next(iter(fields)))


@pytest.mark.parametrize("given", [SCHEMA, json.dumps(SCHEMA)])
def test_schemas_keep_the_order_of_properties(given: Any) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": given, "strict": False}}
    formatted = grammar_of(response_format=wanted)
    structured = grammar_of(structured_outputs={"json": given})
    assert formatted is not None
    assert structured is not None
    assert formatted.text == structured.text
    assert list(json.loads(formatted.text)["properties"]) == ["b", "a"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": None, "structured_outputs": None},
        {"response_format": {"type": "text"}},
        {"structured_outputs": {}},
        {"structured_outputs": {"json": None, "json_object": False}},
        {"structured_outputs": {"disable_any_whitespace": False, "whitespace_pattern": None}},
        {"response_format": {"type": "text"}, "structured_outputs": {}},
    ],
)
def test_neutral_values_leave_the_text_free(fields: dict[str, Any]) -> None:
    assert grammar_of(**fields) is None


def test_the_limits_can_be_reached() -> None:
    assert grammar_of(structured_outputs={"regex": "a" * MAX_GRAMMAR_BYTES}) is not None
    assert grammar_of(structured_outputs={"json": nested(MAX_SCHEMA_DEPTH)}) is not None


_FORMAT = "response_format"
_SCHEMA = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({_FORMAT: "json"}, _FORMAT, "must be"),
        ({_FORMAT: {}}, "response_format.type", "required"),
        ({_FORMAT: {"type": "yaml"}}, "response_format.type", "yaml"),
        ({_FORMAT: {"type": "json_schema"}}, _SCHEMA, "required"),
        ({_FORMAT: {"type": "json_schema", "json_schema": {}}}, _SCHEMA, "required"),
        ({_FORMAT: {"type": "json_schema", "json_schema": {"schema": 5}}}, _SCHEMA, "JSON schema"),
        ({_FORMAT: {"type": "json_schema", "json_schema": {"schema": "{"}}}, _SCHEMA, "JSON"),
        ({_FORMAT: {"type": "json_schema", "json_schema": {"schema": "[]"}}}, _SCHEMA, "an object"),
        ({"structured_outputs": []}, "structured_outputs", "must be"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex", "string"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "empty"),
        ({"structured_outputs": {"grammar": ""}}, "structured_outputs.grammar", "empty"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "empty"),
        ({"structured_outputs": {"choice": "ab"}}, "structured_outputs.choice", "list"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice[0]", "string"),
        ({"structured_outputs": {"json": True}}, "structured_outputs.json", "JSON schema"),
        ({"structured_outputs": {"json": "null"}}, "structured_outputs.json", "an object"),
        ({"structured_outputs": {"json": "[" * 60_000}}, "structured_outputs.json", "deep|JSON"),
        ({"structured_outputs": {"json": '"\\ud800"'}}, "structured_outputs.json", "an object"),
        (
            {"structured_outputs": {"json": '{"const": "\\ud800"}'}},
            "structured_outputs.json",
            "cannot represent",
        ),
        (
            {"structured_outputs": {"json": '{"const": NaN}'}},
            "structured_outputs.json",
            "cannot represent",
        ),
        (
            {"structured_outputs": {"json": nested(MAX_SCHEMA_DEPTH + 1)}},
            "structured_outputs.json",
            "32 levels",
        ),
        (
            {"structured_outputs": {"json": {"const": "x" * MAX_GRAMMAR_BYTES}}},
            "structured_outputs.json",
            "65536",
        ),
        (
            {"structured_outputs": {"json": json.dumps({"const": "é" * 40_000})}},
            "structured_outputs.json",
            "65536",
        ),
        (
            {"structured_outputs": {"regex": "a" * (MAX_GRAMMAR_BYTES + 1)}},
            "structured_outputs.regex",
            "65536",
        ),
        (
            {"structured_outputs": {"choice": ["x" * 300] * 300}},
            "structured_outputs.choice",
            "65536",
        ),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "only one"),
        (
            {"structured_outputs": {"regex": "a"}, _FORMAT: {"type": "json_object"}},
            _FORMAT,
            "both",
        ),
    ],
)
def test_rubbish(fields: dict[str, Any], param: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        grammar_of(**fields)
    assert caught.value.param == param
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({_FORMAT: {"type": "structural_tag"}}, _FORMAT),
        (
            {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
        ),
        (
            {"structured_outputs": {"json": {}, "disable_any_whitespace": True}},
            "structured_outputs.disable_any_whitespace",
        ),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
    ],
)
def test_what_is_not_built(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(UnsupportedParameterError) as caught:
        grammar_of(**fields)
    assert caught.value.param == param


def test_formats_that_no_grammar_knows_are_notes() -> None:
    """JSON Schema takes formats for annotations; properties and values of that name are others."""
    schema = {
        "type": "object",
        "properties": {
            "format": {"type": "string", "format": "color"},
            "day": {"type": "string", "format": "date"},
            "size": {"format": "int32"},
            "other": {"const": {"format": "kept"}},
        },
    }
    for given in (
        make_grammar("json_schema", schema, {}),
        make_grammar(None, None, {"json": json.dumps(schema)}),
    ):
        assert given is not None
        assert json.loads(given.text)["properties"] == {
            "format": {"type": "string"},
            "day": {"type": "string", "format": "date"},
            "size": {},
            "other": {"const": {"format": "kept"}},
        }


def test_large_schemas_are_refused_before_they_are_rewritten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(structured, "replace_one_of", lambda *_: pytest.fail("it takes long"))
    schema = {"oneOf": [{"enum": ["x" * MAX_GRAMMAR_BYTES]}, {"type": "null"}]}
    with pytest.raises(RequestError, match="bytes, at most"):
        make_grammar("json_schema", schema, {})
