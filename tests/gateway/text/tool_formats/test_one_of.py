"""``oneOf`` as pydantic, zod and schemars write unions, where a schema is followed strictly."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.core.errors import RequestError
from gateway.core.tool_use import ToolCallFormat
from gateway.text.schemas.one_of import make_resolver, replace_one_of
from gateway.text.tool_formats.structured import schema_grammar
from tests.gateway.text.tool_formats.examples import written
from tests.gateway.text.tool_formats.test_answer_grammar import PAIR_FORMS, Vocabulary
from tests.gateway.text.tool_formats.test_tool_schemas import grammar_of

FORMS = [ToolCallFormat.HERMES, *PAIR_FORMS]


def record(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


REFERENCE = {"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}
TAGGED = {
    "A": record(kind={"const": "a", "type": "string"}, x={"type": "integer"}),
    "B": record(kind={"enum": ["b"]}, x={"type": "boolean"}),
}
EXTERNAL = {"A": record(a={"type": "integer"}), "B": record(b={"type": "boolean"})}
CASES: dict[str, tuple[dict[str, Any], list[Any], list[Any]]] = {
    "tags": (
        {**record(v={"oneOf": [*REFERENCE]}), "$defs": TAGGED},
        [{"kind": "a", "x": 1}, {"kind": "b", "x": True}],
        [{"kind": "a", "x": True}, {"kind": "c", "x": 1}],
    ),
    "names": (
        {**record(v={"oneOf": [*REFERENCE, {"enum": ["unit"]}]}), "$defs": EXTERNAL},
        [{"a": 1}, {"b": True}, "unit"],
        [{"a": True}, {}, "other"],
    ),
    "nothing": (
        {**record(v={"oneOf": [REFERENCE[0], {"type": "null"}]}), "$defs": TAGGED},
        [{"kind": "a", "x": 1}, None],
        [{"kind": "b", "x": True}],
    ),
}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return Vocabulary(tmp_path_factory.mktemp("one_of"), ())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_strict_tools_follow_members_that_are_references(
    name: str, form: ToolCallFormat, vocabulary: Vocabulary
) -> None:
    schema, fitting, others = CASES[name]
    grammar = grammar_of(schema, form, is_strict=True)
    for value in fitting:
        assert vocabulary.allows(grammar, written(form, [("f", {"v": value})])), value
    for value in others:
        assert not vocabulary.allows(grammar, written(form, [("f", {"v": value})])), value


@pytest.mark.parametrize("name", CASES)
def test_answers_follow_members_that_are_references(name: str, vocabulary: Vocabulary) -> None:
    schema, fitting, others = CASES[name]
    grammar = schema_grammar(schema, "response_format")
    assert all(vocabulary.allows(grammar, json.dumps({"v": value})) for value in fitting)
    assert not any(vocabulary.allows(grammar, json.dumps({"v": value})) for value in others)


@pytest.mark.parametrize(
    "members",
    [
        [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/A"}],
        [{"$ref": "#/$defs/A"}, {"type": "object"}],
        [{"type": "integer"}, {"type": "number"}],
        [{"enum": [1, 2]}, {"enum": [2, 3]}],
        [{"required": ["a"]}, {"additionalProperties": False}],
        [{"$ref": "#/$defs/none"}, {"type": "null"}],
        [{"type": 7}, {"required": True}, {"enum": 4}, {"properties": []}],
        [True, False],
        [],
        5,
    ],
)
def test_members_that_may_overlap_are_left_alone(members: Any) -> None:
    schema = {**record(v={"oneOf": members}), "$defs": TAGGED}
    assert replace_one_of(schema, make_resolver(schema)) == schema


def test_members_that_may_overlap_are_refused(vocabulary: Vocabulary) -> None:
    schema = {**record(v={"oneOf": [REFERENCE[0], {"type": "object"}]}), "$defs": TAGGED}
    with pytest.raises(RequestError, match="oneOf"):
        vocabulary.start(schema_grammar(schema, "response_format"))


def test_many_members_are_compared_by_their_tag_alone() -> None:
    tagged = [record(kind={"const": str(n)}) for n in range(1000)]
    untagged = [record(**{f"p{n}": {}}) for n in range(1000)]
    for members, keyword in ((tagged, "anyOf"), (untagged, "oneOf")):
        schema = {"oneOf": members}
        assert list(replace_one_of(schema, make_resolver(schema))) == [keyword]


def test_many_values_are_compared_in_linear_time() -> None:
    """Half a megabyte of values would otherwise block the gateway's other long work for hours."""
    num_compared = 0

    class Text(str):
        def __eq__(self, other: object) -> bool:
            nonlocal num_compared
            num_compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    first, second = ([Text(f"{name}{index}") for index in range(500)] for name in "ab")
    for members in (
        [{"enum": first}, {"enum": second}],
        [record(kind={"enum": first}, x={}), {**record(kind={"enum": second}), "type": ["object"]}],
        [{"enum": [[one] for one in first]}, {"enum": [[one] for one in second]}],
    ):
        assert replace_one_of({"oneOf": members}, lambda one: one) == {"anyOf": members}
    assert num_compared < 10_000


@pytest.mark.parametrize(
    ("one", "other", "are_equal"),
    [
        *((1, 1.0, True), (1e300, int(1e300), True), ({"a": [1]}, {"a": [1.0]}, True)),
        *((1, 1.5, False), (1, "1", False), ([True], ["True"], False), (None, 0, False)),
        ([], {}, False),
    ],
)
def test_members_share_values_that_json_takes_for_equal(
    one: Any, other: Any, are_equal: bool
) -> None:
    schema = {"oneOf": [{"enum": [[one], "a"]}, {"enum": ["b", [other]]}]}
    assert ("oneOf" in replace_one_of(schema, lambda given: given)) is are_equal
