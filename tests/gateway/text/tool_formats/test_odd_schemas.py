"""Schemas that no grammar follows whole: without ``strict`` none refuses a request, with it the
message names the tool, the place and the keyword. None takes long, and none ends a process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from cluster.core.errors import RequestError
from gateway.core.tool_use import ToolCallFormat
from gateway.text.schemas import arguments
from gateway.text.schemas.alternatives import UnsupportedSchemaError, alternatives
from gateway.text.schemas.arguments import ArgumentSet
from gateway.text.schemas.clean_schema import CleanSchema
from gateway.text.schemas.references import MAX_LEVELS
from gateway.text.tool_formats import call_grammar, pair_grammar
from gateway.text.tool_formats.answer_parser import AnswerParser
from gateway.text.tool_formats.structured import MAX_GRAMMAR_BYTES, schema_grammar
from gateway.text.tool_formats.tools import make_tool_use
from tests.gateway.text.tool_formats.examples import written
from tests.gateway.text.tool_formats.test_answer_grammar import PAIR_FORMS, Vocabulary
from tests.gateway.text.tool_formats.test_tool_schemas import grammar_of, use_of

pytestmark = pytest.mark.heavy

FORMS = [ToolCallFormat.HERMES, *PAIR_FORMS]


def one(schema: Any, **beside: Any) -> dict[str, Any]:
    """A function with one argument."""
    return {"type": "object", "properties": {"a": schema}, "required": ["a"], **beside}


def chain(link: Any, length: int) -> dict[str, Any]:
    """Definitions that each refer to the next; ``link`` makes one of a reference."""
    places = range(length)
    links = {f"d{n}": link({"$ref": f"#/$defs/d{n + 1}"}) for n in places}
    return one({"$ref": "#/$defs/d0"}, **{"$defs": {**links, f"d{length}": {"type": "string"}}})


FOLLOWED_BY_NONE: dict[str, tuple[dict[str, Any], str]] = {
    "uniqueItems": (one({"type": "array", "uniqueItems": True}), "properties.a.uniqueItems"),
    "not": (one({"not": {"type": "string"}}), "properties.a.not"),
    "if": (one({"if": {"type": "string"}, "then": {"minLength": 2}}), "properties.a.if"),
    "dependentRequired": ({**one({}), "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    "unknown type": (one({"type": "any"}), "properties.a.type"),
    "type is a number": (one({"type": 7}), "properties.a.type"),
    "minLength is a text": (one({"type": "string", "minLength": "2"}), "properties.a.minLength"),
    "no schema": (one("string"), "properties.a must be a JSON schema"),
    "properties is a list": ({"type": "object", "properties": ["a"]}, "properties"),
    "required is a bool": ({"properties": {"a": {}}, "required": True}, "required"),
    "empty enum": (one({"enum": []}), "properties.a.enum"),
    "reference to nothing": (one({"$ref": "#/$defs/none"}), "properties.a.$ref"),
    "reference to a long index": (
        one({"$ref": f"#/examples/{'9' * 5000}"}, examples=[{}]),
        "properties.a.$ref",
    ),
    "reference elsewhere": (one({"$ref": "https://example.org/x.json"}), "properties.a.$ref"),
    "reference is no URL": (one({"$ref": "//[b"}, **{"$id": "https://a/"}), "properties.a.$ref"),
    "id is no URL": (one({"$ref": "#b"}, **{"$id": "https://[a/"}), "properties.a.$ref"),
    "circle": (one({"$ref": "#/$defs/x"}, **{"$defs": {"x": {"$ref": "#/$defs/x"}}}), "a.$ref"),
    "look-ahead": (one({"type": "string", "pattern": "^(?!x)"}), "properties.a.pattern"),
    "pattern of names": ({"patternProperties": {"(?=a)": {}}}, "patternProperties.(?=a)"),
    "deep": (chain(lambda ref: {"properties": {"x": ref}}, 900), "nested too deeply through $ref"),
}
COMPILED_BY_NONE: dict[str, dict[str, Any]] = {
    "no text fits": one({"type": "string", "minLength": 5, "maxLength": 2}),
    "no number fits": one({"type": "integer", "minimum": 5, "maximum": 2}),
    "two types": one({"allOf": [{"type": "string"}, {"type": "integer"}]}),
    "broken pattern": one({"type": "string", "pattern": "^{a"}),
    "false": one(False),
    "overlapping oneOf": one({"oneOf": [{"type": "integer"}, {"type": "number"}]}),
    "overlapping names": one({"type": "object", "patternProperties": {"^a": {}, "^ab": {}}}),
    "required and forbidden": {**one({}), "required": ["b"], "additionalProperties": False},
    "not an object": {"allOf": [{"type": "string"}], "properties": {"a": {}}},
    "growing allOf": chain(
        lambda ref: {"type": "object", "allOf": [{"properties": {"x": ref, "y": ref}}] * 2}, 30
    ),
}
FOLLOWED: dict[str, dict[str, Any]] = {
    "graph of anyOf": chain(lambda ref: {"anyOf": [ref, ref]}, 40),
    "graph of allOf": chain(lambda ref: {"allOf": [ref, ref]}, 40),
    "graph of properties": chain(lambda ref: {"properties": {"x": ref, "y": ref}}, 40),
    "chain of anyOf": chain(lambda ref: {"anyOf": [ref]}, 60),
    "long chain": chain(lambda ref: ref, 400),
    "names of keywords": one({"properties": {"$ref": {"type": "string"}, "enum": {}, "not": {}}}),
    "unknown format": one({"type": "integer", "format": "int32"}),
    "unknown format, no type": one({"format": "color"}),
    "names are texts": one({"type": "object", "propertyNames": {"type": "string"}}),
    "unknown keyword": one({"type": "string", "x-order": 1, "discriminator": {"mapping": {}}}),
}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return Vocabulary(tmp_path_factory.mktemp("odd"), ())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*FOLLOWED_BY_NONE, *COMPILED_BY_NONE, *FOLLOWED])
def test_no_schema_refuses_a_request_that_is_not_strict(
    name: str, form: ToolCallFormat, vocabulary: Vocabulary
) -> None:
    known = {key: schema for key, (schema, _) in FOLLOWED_BY_NONE.items()}
    schema = {**known, **COMPILED_BY_NONE, **FOLLOWED}[name]
    vocabulary.start(grammar_of(schema, form))
    text = written(form, [("f", {"a": "x"})])
    AnswerParser(form, use_of(schema)).feed(text, is_last=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FOLLOWED_BY_NONE)
def test_a_strict_tool_is_refused_by_place_and_keyword(name: str, form: ToolCallFormat) -> None:
    schema, place = FOLLOWED_BY_NONE[name]
    with pytest.raises(RequestError) as caught:
        grammar_of(schema, form, is_strict=True)
    assert caught.value.param == "tools[0].parameters"
    assert "tools[0].parameters of 'f'" in str(caught.value)
    assert place in str(caught.value)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", COMPILED_BY_NONE)
def test_a_strict_tool_that_does_not_compile_is_named(
    name: str, form: ToolCallFormat, vocabulary: Vocabulary
) -> None:
    with pytest.raises(RequestError, match=r"tools\[0\]\.parameters of 'f'"):
        vocabulary.start(grammar_of(COMPILED_BY_NONE[name], form, is_strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FOLLOWED)
def test_a_strict_tool_that_is_followed(
    name: str, form: ToolCallFormat, vocabulary: Vocabulary
) -> None:
    vocabulary.start(grammar_of(FOLLOWED[name], form, is_strict=True))


def test_schemas_too_large_for_a_grammar_take_any_arguments(vocabulary: Vocabulary) -> None:
    large = {f"p{n}": {"enum": [f"{n}" + "x" * 999]} for n in range(90)}
    for form in FORMS:
        grammar = grammar_of({"properties": large}, form)
        assert len(grammar.text) < MAX_GRAMMAR_BYTES
        assert vocabulary.allows(grammar, written(form, [("f", {"other": "x"})]))
        with pytest.raises(RequestError, match="bytes of schemas"):
            grammar_of({"properties": large}, form, is_strict=True)


@pytest.mark.parametrize("form", PAIR_FORMS)
@pytest.mark.parametrize("limit", [{}, {"maxItems": 1}], ids=["the same", "others"])
def test_definitions_are_not_copied_for_each_argument(
    form: ToolCallFormat, limit: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body of 8 MB would otherwise take 16 GB of the gateway's memory."""
    made: list[int] = []

    def make(schema: Mapping[str, Any], is_strict: bool = True) -> str:
        made.append(len(rule := call_grammar.json_rule(schema, is_strict)))
        return rule

    monkeypatch.setattr(pair_grammar, "json_rule", make)
    definition = {"items": {"enum": [f"{n:0100}" for n in range(300)]}}
    named = {
        f"p{n}": {"$ref": "#/$defs/x", **{name: n + low for name, low in limit.items()}}
        for n in range(100)
    }
    schema = {"properties": named, "$defs": {"x": {"type": "array", **definition}}}
    assert len(grammar_of(schema, form).text) < MAX_GRAMMAR_BYTES
    assert sum(made) < 4 * MAX_GRAMMAR_BYTES
    if limit:
        with pytest.raises(RequestError, match="bytes of schemas"):
            grammar_of(schema, form, is_strict=True)


@pytest.mark.parametrize("form", PAIR_FORMS)
def test_definitions_are_not_expanded_for_each_argument(form: ToolCallFormat) -> None:
    """A tool of 40 kB would otherwise take 10 seconds."""
    definition = {"anyOf": [{"minItems": 1} for _ in range(300)]}
    named = {f"p{n}": {"$ref": "#/$defs/x", "type": "string", "minItems": n} for n in range(200)}
    schema = {"properties": named, "$defs": {"x": definition}}
    grammar_of(schema, form)
    with pytest.raises(RequestError, match="has too many alternatives and values"):
        grammar_of(schema, form, is_strict=True)


def test_pieces_of_alternatives_are_limited() -> None:
    many = [{"minItems": 1} for _ in range(400)]
    schema = {"allOf": [*many, {"anyOf": many}]}
    with pytest.raises(UnsupportedSchemaError, match="has too many alternatives and values"):
        alternatives(schema, CleanSchema({}, {}), is_strict=False)


@pytest.mark.parametrize("form", PAIR_FORMS)
def test_sets_of_arguments_are_limited_before_they_are_made(
    form: ToolCallFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tool of 60 kB would otherwise take 6 seconds."""
    made: list[ArgumentSet] = []

    def make(**values: Any) -> ArgumentSet:
        made.append(ArgumentSet(**values))
        return made[-1]

    monkeypatch.setattr(arguments, "ArgumentSet", make)
    named: dict[str, Any] = {f"p{n}": {} for n in range(500)}
    schema = {"properties": named, "anyOf": [{"minItems": 1} for _ in range(100)]}
    grammar_of(schema, form)
    assert len(made) == 1  # of any arguments
    with pytest.raises(RequestError, match="has too many alternatives and arguments"):
        grammar_of(schema, form, is_strict=True)


def test_a_deep_schema_is_of_any_type_below_what_is_followed(vocabulary: Vocabulary) -> None:
    schema: dict[str, Any] = {"type": "boolean"}
    for _ in range(20):
        schema = {"type": "object", "properties": {"x": schema}}
    (tool,) = use_of(schema).tools
    use = make_tool_use([tool])
    assert use is not None
    for form in FORMS:
        vocabulary.start(grammar_of(schema, form))


@pytest.mark.parametrize(
    "link",
    [lambda ref: {"properties": {"x": ref}}, lambda ref: {"anyOf": [{"items": ref}]}],
    ids=["properties", "anyOf"],
)
def test_answers_of_deep_schemas_are_refused_before_they_are_compiled(link: Any) -> None:
    """The compiler's stack would not hold them: the worker would end."""
    with pytest.raises(RequestError, match=f"through .ref: at most {MAX_LEVELS} levels"):
        schema_grammar(chain(link, 900), "response_format.json_schema.schema")
    schema_grammar(chain(link, 100), "response_format.json_schema.schema")
