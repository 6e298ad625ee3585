"""What answers must follow: calls of every form, reasoning before them, marks that are tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from cluster.core.errors import RequestError
from gateway.core.thinking import Thinking
from gateway.core.tool_use import Tool, ToolCallFormat, ToolUse
from gateway.text.tokenizer import Tokenizer
from gateway.text.tool_formats.answer_grammar import answer_grammar
from gateway.text.tool_formats.call_syntax import SYNTAXES
from gateway.text.tool_formats.structured import make_grammar
from tests.gateway.fakes import EOS_ID, tiny_backend
from tests.gateway.text.tool_formats.examples import TOKENS, WEATHER, written
from workers.requests.request import Grammar
from workers.sampling.grammar import GrammarState
from workers.sampling.grammar_compiler import GrammarCompiler

FORMS = sorted(SYNTAXES, key=lambda form: form.name)
PAIR_FORMS = [form for form in FORMS if SYNTAXES[form].pairs is not None]
CLOSED = {**WEATHER, "additionalProperties": False}
TOOLS = (Tool(name="weather", parameters=CLOSED), Tool(name="now"))
ARGUMENTS = {
    "city": 'Bad "Ems" }]',
    "days": 3,
    "units": "metric",
    "where": None,
    "places": [{"name": "a"}],
    "is_short": True,
}
AUTO, MUST = ToolUse(tools=TOOLS), ToolUse(tools=TOOLS, must_call=True)
NUMBER = make_grammar("json_schema", {"type": "integer"}, {})


class Vocabulary:
    """Compiles grammars, and says which texts they allow."""

    def __init__(self, folder: Path, tokens: tuple[str, ...]) -> None:
        self.backend = tiny_backend()
        self.backend.add_tokens([tokenizers.AddedToken(t, special=False) for t in tokens])
        self.backend.save(str(folder / "tokenizer.json"))
        self.mark_ids = Tokenizer(self.backend).grammar_token_ids
        self._compiler = GrammarCompiler(folder, self.backend.get_vocab_size(), [EOS_ID])

    def start(self, grammar: Grammar) -> GrammarState:
        """The state before any token."""
        return self._compiler.compile(grammar).start()

    def allows(self, grammar: Grammar | None, text: str) -> bool:
        """Whether an answer may be ``text``, as a whole."""
        assert grammar is not None
        state = self.start(grammar)
        for token in [*self.backend.encode(text, add_special_tokens=False).ids, EOS_ID]:
            if not bool(state.mask().allowed[token]):
                return False
            state.advance(token)
        return True


@pytest.fixture(scope="module", params=["tokens", "letters"])
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One whose marks are tokens, as in the models, and one without such tokens."""
    tokens = TOKENS if request.param == "tokens" else ()
    return Vocabulary(tmp_path_factory.mktemp(request.param), tokens)


def test_tokens_that_look_like_tags_are_no_text(tmp_path: Path) -> None:
    """llguidance takes them for special tokens, whatever the vocabulary says of them."""
    known = Vocabulary(tmp_path, ("<think>", "[x]", "｜DSML｜"))
    assert "<think>" in known.mark_ids
    assert {"[x]", "｜DSML｜"}.isdisjoint(known.mark_ids)
    free = make_grammar(None, None, {"regex": r"(.|\n)*"})
    assert not known.allows(free, "a <think>")
    assert known.allows(free, "a [x] ｜DSML｜")


@pytest.mark.parametrize("form", FORMS)
def test_calls_follow_the_tools(vocabulary: Vocabulary, form: ToolCallFormat) -> None:
    now: tuple[str, dict[str, Any]] = ("now", {})
    weather = ("weather", ARGUMENTS)
    both, one = written(form, [weather, now]), written(form, [now])
    wrong = [
        written(form, [("never", {})]),
        written(form, [("weather", {"days": 3})]),
        written(form, [("weather", {"city": "x", "days": "x"})]),
        written(form, [("weather", {"city": "x", "units": "odd"})]),
        written(form, [("weather", {"city": "x", "more": 1})]),
        written(form, [now])[:-1],
        f"{one} and more",
    ]
    auto, must = (answer_grammar(use, form, vocabulary.mark_ids, None) for use in (AUTO, MUST))
    for text in (both, one):
        assert vocabulary.allows(auto, text)
        assert vocabulary.allows(auto, f"x < y {text}")
        assert vocabulary.allows(must, text)
    assert vocabulary.allows(auto, "no call <")
    assert [text for text in ["no call", f"x {one}", *wrong] if vocabulary.allows(must, text)] == []
    assert [text for text in wrong if vocabulary.allows(auto, text)] == []
    single = ToolUse(tools=TOOLS, must_call=True, only=("now",), is_parallel=False)
    grammar = answer_grammar(single, form, vocabulary.mark_ids, None)
    assert vocabulary.allows(grammar, one)
    assert not vocabulary.allows(grammar, written(form, [now, now]))


@pytest.mark.parametrize("form", PAIR_FORMS)
def test_arguments_that_a_schema_leaves_open(vocabulary: Vocabulary, form: ToolCallFormat) -> None:
    more = written(form, [("f", {"a": 1, "other": "x"})])
    properties = {"a": {"type": "integer"}}
    for parameters, is_open in (
        ({"properties": properties}, False),
        ({"properties": properties, "additionalProperties": True}, True),
        ({}, True),
        (None, False),
    ):
        use = ToolUse(tools=(Tool(name="f", parameters=parameters),), must_call=True)
        grammar = answer_grammar(use, form, vocabulary.mark_ids, None)
        assert vocabulary.allows(grammar, more) is is_open, parameters


@pytest.mark.parametrize(
    "form", [ToolCallFormat.GLM, ToolCallFormat.QWEN_CODER, ToolCallFormat.HERMES]
)
@pytest.mark.parametrize(
    ("thinking", "prefixes", "wrong"),
    [
        (Thinking.OPEN, ["Hm.\n</think>\n\n", "</think>"], [""]),
        (Thinking.POSSIBLE, ["", "<think>\nHm. <\n</think>\n\n", "\n<think></think>"], ["Hm."]),
    ],
)
def test_reasoning_comes_before_calls_and_structured_output(
    vocabulary: Vocabulary,
    form: ToolCallFormat,
    thinking: Thinking,
    prefixes: list[str],
    wrong: list[str],
) -> None:
    ids, call = vocabulary.mark_ids, written(form, [("weather", {"city": "x"})])
    must = answer_grammar(MUST, form, ids, None, thinking)
    auto = answer_grammar(AUTO, form, ids, None, thinking)
    alone = answer_grammar(None, form, ids, NUMBER, thinking)
    beside = answer_grammar(AUTO, form, ids, NUMBER, thinking)
    for prefix in prefixes:
        assert vocabulary.allows(must, prefix + call), prefix
        assert vocabulary.allows(auto, prefix + call), prefix
        assert vocabulary.allows(auto, f"{prefix}On it. {call}"), prefix
        assert vocabulary.allows(auto, f"{prefix}No."), prefix
        assert vocabulary.allows(alone, f"{prefix}17"), prefix
        assert vocabulary.allows(beside, f"{prefix}17"), prefix
        assert vocabulary.allows(beside, prefix + call), prefix
        assert not vocabulary.allows(alone, f"{prefix}seventeen"), prefix
        assert not vocabulary.allows(must, f"{prefix}No."), prefix
    for prefix in wrong:
        assert not vocabulary.allows(must, prefix + call), prefix
        assert not vocabulary.allows(alone, f"{prefix}17"), prefix


@pytest.mark.parametrize(
    ("wanted", "good", "bad"),
    [
        ({"choice": ["a", "b"]}, "a", "c"),
        ({"regex": "[0-9]+/x"}, "12/x", "x"),
        ({"grammar": 'start: "x" " y"'}, "x y", "y"),
        ({"json": {"type": "integer"}}, "3", "three"),
    ],
)
def test_every_kind_of_structured_output_may_follow_reasoning(
    vocabulary: Vocabulary, wanted: dict[str, Any], good: str, bad: str
) -> None:
    answer = make_grammar(None, None, wanted)
    grammar = answer_grammar(
        None, ToolCallFormat.HERMES, vocabulary.mark_ids, answer, Thinking.OPEN
    )
    assert grammar is not None
    assert grammar.field == f"structured_outputs.{next(iter(wanted))}"
    assert vocabulary.allows(grammar, f"a</think>\n{good}")
    assert not vocabulary.allows(grammar, f"a</think>\n{bad}")


def test_what_needs_no_grammar_has_none() -> None:
    assert answer_grammar(None, ToolCallFormat.HERMES, {}, None, Thinking.OPEN) is None
    assert answer_grammar(None, ToolCallFormat.HERMES, {}, NUMBER, None) is NUMBER


def test_notes_in_a_schema_take_no_room() -> None:
    """Descriptions of tools are long, and not part of what may be written."""
    long = "x" * 30_000
    schema = {
        "title": long,
        "description": long,
        "properties": {
            "description": {"type": "string", "description": long},
            "kind": {"enum": [{"title": "kept"}], "default": long},
        },
    }
    use = ToolUse(tools=(Tool(name="f", parameters=schema),))
    grammar = answer_grammar(use, ToolCallFormat.HERMES, {}, None)
    assert grammar is not None
    assert long not in grammar.text
    assert '"description": {"type": "string"}' in grammar.text
    assert '{"enum": [{"title": "kept"}]}' in grammar.text
    names = {f"p{number}": {"enum": [f"{number}" + "x" * 999]} for number in range(70)}
    large = ToolUse(tools=(Tool(name="f", parameters={"properties": names}),))
    with pytest.raises(RequestError, match="tools have"):
        answer_grammar(large, ToolCallFormat.GLM, {}, None)


def test_only_strict_tools_refuse_what_a_grammar_cannot_express(vocabulary: Vocabulary) -> None:
    schema = {"properties": {"a": {"type": "array", "uniqueItems": True}}, "required": ["a"]}
    said = written(ToolCallFormat.HERMES, [("f", {"a": [1, 1]})])
    check_strictness(schema, said, r"of 'f': properties\.a\.uniqueItems", vocabulary)


@pytest.mark.parametrize("pattern", ["(?!x)y", "(?<=a)b", r"(a)\1", r"\bword\b"])
def test_only_strict_tools_refuse_patterns_that_are_not_regular(
    pattern: str, vocabulary: Vocabulary
) -> None:
    text = {"type": "string", "pattern": pattern}
    schema = {"properties": {"pattern": text}, "required": ["pattern"]}
    said = written(ToolCallFormat.HERMES, [("f", {"pattern": "any"})])
    check_strictness(schema, said, r"properties\.pattern\.pattern must be a pattern", vocabulary)


def check_strictness(
    schema: dict[str, Any], said: str, refused: str, vocabulary: Vocabulary
) -> None:
    """Without ``strict`` an answer is allowed, with it the schema is refused."""
    for is_strict in (False, True):
        tool = Tool(name="f", parameters=schema, is_strict=is_strict)
        use = ToolUse(tools=(tool,))
        if is_strict:
            with pytest.raises(RequestError, match=refused):
                answer_grammar(use, ToolCallFormat.HERMES, vocabulary.mark_ids, None)
        else:
            grammar = answer_grammar(use, ToolCallFormat.HERMES, vocabulary.mark_ids, None)
            assert vocabulary.allows(grammar, said)


def test_the_examples_are_json() -> None:
    assert json.loads(json.dumps(ARGUMENTS)) == ARGUMENTS
