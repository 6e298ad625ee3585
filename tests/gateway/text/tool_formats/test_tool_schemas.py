"""Schemas of tools as pydantic, zod-to-json-schema, schemars and MCP servers write them.

Every form takes the examples of each and gives them back; what a form's grammar lets a model write
follows the schema, whatever the model draws.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import jsonschema
import pytest

from cluster.core.errors import RequestError
from gateway.core.tool_use import Tool, ToolCallFormat, ToolUse
from gateway.text.tool_formats.answer_grammar import answer_grammar
from gateway.text.tool_formats.answer_parser import AnswerParser
from gateway.text.tool_formats.call_syntax import SYNTAXES
from gateway.text.tool_formats.structured import schema_grammar
from tests.gateway.fakes import EOS_ID
from tests.gateway.text.tool_formats.examples import written
from tests.gateway.text.tool_formats.test_answer_grammar import PAIR_FORMS, Vocabulary
from tests.paths import DATA
from workers.requests.request import Grammar

pytestmark = pytest.mark.heavy

FORMS = [ToolCallFormat.HERMES, *PAIR_FORMS]
_MAX_TOKENS = 1000
_CLOSERS = '<>"}]\n,:@'
_UNFOLLOWED = {"uniqueItems", "propertyNames"}
"""Keywords that no form follows, unless strict."""


@dataclass(frozen=True)
class Case:
    """A schema, and arguments that follow it."""

    name: str
    schema: dict[str, Any]
    examples: list[dict[str, Any]]


@cache
def cases() -> tuple[Case, ...]:
    lines = (DATA / "tool-schemas.jsonl").read_text(encoding="utf-8").splitlines()
    found = map(json.loads, lines)
    return tuple(Case(f"{c['tool']}: {c['name']}", c["schema"], c["examples"]) for c in found)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return Vocabulary(tmp_path_factory.mktemp("schemas"), ())


def grammar_of(schema: dict[str, Any], form: ToolCallFormat, is_strict: bool = False) -> Grammar:
    found = answer_grammar(use_of(schema, is_strict), form, {}, None)
    assert found is not None
    return found


def use_of(schema: dict[str, Any], is_strict: bool = False) -> ToolUse:
    tool = Tool(name="f", parameters=schema, is_strict=is_strict, path="tools[0].parameters")
    return ToolUse(tools=(tool,), must_call=True, is_parallel=False)


def read(schema: dict[str, Any], form: ToolCallFormat, text: str) -> Any:
    """Arguments of the call in a text."""
    parser = AnswerParser(form, use_of(schema))
    (call,) = parser.feed(text, is_last=True).merge_calls().calls
    assert parser.has_calls, text
    return json.loads(call.arguments)


def standard(schema: Any) -> Any:
    """A schema whose ``nullable`` (OpenAPI) is said in JSON Schema's words."""
    if isinstance(schema, list):
        return [standard(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: standard(value) for key, value in schema.items() if key != "nullable"}
    return {"anyOf": [found, {"type": "null"}]} if schema.get("nullable") is True else found


def check(arguments: Any, schema: dict[str, Any]) -> None:
    known = standard(schema)
    draft = jsonschema.validators.validator_for(known, jsonschema.Draft202012Validator)
    draft(known, format_checker=draft.FORMAT_CHECKER).validate(arguments)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_every_form_takes_the_examples_and_gives_them_back(
    case: Case, form: ToolCallFormat, vocabulary: Vocabulary
) -> None:
    grammar = grammar_of(case.schema, form)
    for example in case.examples:
        check(example, case.schema)
        text = written(form, [("f", example)])
        assert vocabulary.allows(grammar, text), text
        assert read(case.schema, form, text) == example


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_what_a_model_may_write_follows_the_schema(
    case: Case, form: ToolCallFormat, vocabulary: Vocabulary
) -> None:
    check_walks(case, form, vocabulary, 1)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_what_many_models_may_write_follows_the_schema(
    case: Case, form: ToolCallFormat, vocabulary: Vocabulary
) -> None:
    assert check_walks(case, form, vocabulary, 12) > 0, "some come to an end"


NEVER: dict[str, Any] = {"not": {}}
"""As zod-to-json-schema writes what no value is."""
CONDITION = {"if": {"properties": {"a": {"const": 1}}}, "then": {"properties": {"z": {}}}}
NUMBER = {"type": "integer"}
TWO: dict[str, Any] = {"type": "object", "properties": {"a": NUMBER, "b": NUMBER}}


def one(schema: Any, **beside: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": schema}, "required": ["a"], **beside}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("schema", "fitting", "others"),
    [
        (one({"anyOf": [NEVER, NUMBER]}), [{"a": 1}], [{"a": "x"}, {"a": []}]),
        (one(NUMBER, additionalProperties=NEVER), [{"a": 1}], [{"a": 1, "b": 1}]),
        ({"properties": {"a": NUMBER, "b": NEVER}}, [{"a": 1}], [{"a": 1, "b": 1}]),
        (one(NUMBER, **CONDITION), [{"a": 1}, {"a": 1, "z": 2}], [{"a": "x"}]),
        (one(NUMBER, allOf=[CONDITION]), [{"a": 1}, {"a": 1, "z": 2}], [{"a": "x"}]),
        (one(NUMBER, **CONDITION, additionalProperties=False), [{"a": 1}], [{"a": 1, "z": 2}]),
        (one(NUMBER, type=["object", "null"]), [{"a": 1}], [None]),
        ({**TWO, "minProperties": 1}, [{"a": 1}, {"b": 1}, {"a": 1, "b": 1}], [{}]),
        ({**TWO, "maxProperties": 1}, [{}, {"a": 1}, {"b": 1}], [{"a": 1, "b": 1}]),
        (
            {"type": "object", "additionalProperties": NUMBER, "minProperties": 2},
            [{"a": 1, "b": 1}],
            [{}, {"a": 1}],
        ),
    ],
)
def test_only_what_follows_the_schema_is_written(
    schema: dict[str, Any],
    fitting: list[Any],
    others: list[Any],
    form: ToolCallFormat,
    vocabulary: Vocabulary,
) -> None:
    grammar = grammar_of(schema, form)
    for arguments in fitting:
        assert vocabulary.allows(grammar, written(form, [("f", arguments)]))
    for arguments in others:
        text = written(form, [("f", arguments or {})])
        null = text.replace("{}", "null") if arguments is None else text
        assert not vocabulary.allows(grammar, null), null


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "beside", [{"minProperties": 1}, {"maxProperties": 1}, {"anyOf": [{"minProperties": 1}]}]
)
def test_limits_that_a_grammar_does_not_count_add_no_keys(
    beside: dict[str, Any], form: ToolCallFormat, vocabulary: Vocabulary
) -> None:
    """Where others are allowed beside keys that may be left out."""
    inner = {**TWO, **beside}
    for schema in (one(inner), one({"type": "array", "items": inner})):
        grammar = grammar_of(schema, form)
        value: Any = {"a": 1}
        arguments = {"a": [value] if "items" in schema["properties"]["a"] else value}
        assert vocabulary.allows(grammar, written(form, [("f", arguments)]))
    closed = grammar_of(one({**TWO, "minProperties": 1, "additionalProperties": False}), form)
    assert not vocabulary.allows(closed, written(form, [("f", {"a": {}})]))


@pytest.mark.parametrize("is_strict", [False, True])
@pytest.mark.parametrize("form", PAIR_FORMS)
def test_named_and_other_arguments_are_counted(
    form: ToolCallFormat, is_strict: bool, vocabulary: Vocabulary
) -> None:
    counted = {"minProperties": 2, "maxProperties": 3}
    schema = {**TWO, "required": ["b"], "additionalProperties": NUMBER, **counted}
    grammar = grammar_of(schema, form, is_strict)
    for names in ("ab", "bc", "abc", "bcd"):
        text = written(form, [("f", dict.fromkeys(names, 1))])
        assert vocabulary.allows(grammar, text), names
    for names in ("b", "ac", "abcd", "bcde"):
        text = written(form, [("f", dict.fromkeys(names, 1))])
        assert not vocabulary.allows(grammar, text), names


@pytest.mark.parametrize("form", PAIR_FORMS)
def test_many_arguments_are_counted_by_strict_tools_or_refused(
    form: ToolCallFormat, vocabulary: Vocabulary
) -> None:
    for most in (1000, 1001):
        schema = {"type": "object", "additionalProperties": NUMBER, "maxProperties": most}
        assert vocabulary.allows(grammar_of(schema, form), written(form, [("f", {"a": 1})]))
    with pytest.raises(RequestError, match="needs more than 1000 rules to count arguments"):
        grammar_of(schema, form, is_strict=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_strict", [False, True])
@pytest.mark.parametrize("kind", ["integer", "number"])
@pytest.mark.parametrize(
    "bounds",
    [
        {"minimum": -(2**63), "maximum": 2**63 - 1},
        {"exclusiveMinimum": -(2**63), "exclusiveMaximum": 2**63},
        {"minimum": -(2**127), "maximum": 2**64 - 1},
        {"minimum": -sys.float_info.max, "maximum": sys.float_info.max},
    ],
)
def test_bounds_beyond_the_integers_of_64_bits_are_followed(
    bounds: dict[str, float],
    kind: str,
    is_strict: bool,
    form: ToolCallFormat,
    vocabulary: Vocabulary,
) -> None:
    schema = one({"type": kind, **bounds})
    grammar = grammar_of(schema, form, is_strict)
    for value in (5 - 2**62, 0, 2**62):
        assert vocabulary.allows(grammar, written(form, [("f", {"a": value})]))
    assert not vocabulary.allows(grammar, written(form, [("f", {"a": "x"})]))
    answer = schema_grammar(schema, "response_format")
    assert vocabulary.allows(answer, '{"a": -7}')
    assert not vocabulary.allows(answer, '{"a": "x"}')


@pytest.mark.parametrize("form", FORMS)
def test_arguments_that_no_schema_names_may_have_any_names(
    form: ToolCallFormat, vocabulary: Vocabulary
) -> None:
    schema = {"type": "object", "additionalProperties": NUMBER}
    grammar = grammar_of(schema, form)
    for name in ("New York", "é", "a/b", "@type", "x[]", "日本 語"):
        text = written(form, [("f", {name: 1})])
        assert vocabulary.allows(grammar, text), name
        assert read(schema, form, text) == {name: 1}


def check_walks(case: Case, form: ToolCallFormat, vocabulary: Vocabulary, count: int) -> int:
    """Draw answers and check the arguments of those that end; how many do."""
    grammar = grammar_of(case.schema, form)
    texts = [walk(vocabulary, grammar, form, seed) for seed in range(count)]
    for text in filter(None, texts):
        arguments = read(case.schema, form, text)
        try:
            check(arguments, case.schema)
        except jsonschema.ValidationError as err:
            if not _UNFOLLOWED & set(err.absolute_schema_path):
                raise
    return sum(text is not None for text in texts)


def walk(vocabulary: Vocabulary, grammar: Grammar, form: ToolCallFormat, seed: int) -> str | None:
    """An answer that a model without knowledge draws; None where it comes to no end."""
    rng = random.Random(seed)
    state = vocabulary.start(grammar)
    pairs = SYNTAXES[form].pairs
    end = vocabulary.backend.encode(pairs.end if pairs else '"', add_special_tokens=False).ids
    drawn: list[int] = []
    for _ in range(_MAX_TOKENS):
        allowed = state.mask().allowed.nonzero().flatten().tolist()
        assert allowed, state.error
        token = _draw(vocabulary, allowed, drawn, end, rng)
        if token == EOS_ID:
            return vocabulary.backend.decode(drawn, skip_special_tokens=False)
        drawn.append(token)
        state.advance(token)
    return None


def _draw(
    vocabulary: Vocabulary, allowed: list[int], drawn: list[int], end: list[int], rng: random.Random
) -> int:
    """Ends of values are likely, and gone on with once they are begun."""
    if EOS_ID in allowed:
        return EOS_ID
    begun = next((n for n in range(len(end) - 1, 0, -1) if drawn[-n:] == end[:n]), 0)
    if begun and end[begun] in allowed and rng.random() < 0.98:
        return end[begun]
    texts = {token: vocabulary.backend.decode([token]) for token in allowed}
    closers = [token for token, text in texts.items() if text and text in _CLOSERS]
    if closers and rng.random() < 0.5:
        return rng.choice(closers)
    plain = [token for token, text in texts.items() if text.isascii()]
    return rng.choice(plain or allowed)
