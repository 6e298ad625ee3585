"""What an answer in the Harmony format must follow: tools, structured output, where it begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers

from cluster.core.errors import RequestError
from gateway.core.tool_use import Tool, ToolUse
from gateway.text.harmony.grammar import harmony_grammar
from gateway.text.harmony.special_tokens import (
    CALL,
    CHANNEL,
    CONSTRAIN,
    END,
    MESSAGE,
    OPENED,
    SPECIAL_TOKENS,
    START,
)
from gateway.text.tool_formats.structured import MAX_GRAMMAR_BYTES, make_grammar
from tests.gateway.fakes import EOS_ID, tiny_backend
from tests.gateway.text.tool_formats.test_tools import OFFERED
from workers.requests.request import Grammar, GrammarKind
from workers.sampling.grammar_compiler import GrammarCompiler


@pytest.fixture(scope="module")
def backend() -> tokenizers.Tokenizer:
    """The vocabulary of the tests, and the format's marks."""
    made = tiny_backend()
    made.add_special_tokens([*SPECIAL_TOKENS])
    return made


@pytest.fixture(scope="module")
def compiler(
    backend: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> GrammarCompiler:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    return GrammarCompiler(folder, backend.get_vocab_size(), [EOS_ID])


NEXT = f"{END}{START}assistant"
THOUGHT = f"{CHANNEL}analysis{MESSAGE}Well, f(x) <y>.{NEXT}"
FINAL = f"{CHANNEL}final{MESSAGE}Fine."
WITHIN_FINAL = f"{OPENED}{CHANNEL}final{MESSAGE}"
WITHIN_THOUGHT = f"{OPENED}{CHANNEL}analysis{MESSAGE}"


def call(name: str, arguments: str) -> str:
    return f"{CHANNEL}commentary to=functions.{name} {CONSTRAIN}json{MESSAGE}{arguments}{CALL}"


def final(text: str) -> str:
    return f"{CHANNEL}final{MESSAGE}{text}"


NOW, RAIN = call("now", "{}"), call("weather", '{"city": "x", "days": 3}')
NUMBER = Grammar(kind=GrammarKind.JSON_SCHEMA, text='{"type":"integer"}', field="response_format")
WORDS = Grammar(kind=GrammarKind.REGEX, text="a", field="structured_outputs.regex")
TOOLS, MUST = ToolUse(tools=OFFERED), ToolUse(tools=OFFERED, must_call=True)


@pytest.mark.parametrize(
    ("use", "answer", "good", "bad"),
    [
        (
            TOOLS,
            None,
            [FINAL, THOUGHT + FINAL, THOUGHT + NOW, NOW, THOUGHT * 2 + RAIN],
            ["no channel", call("never", "{}"), call("weather", "{}"), THOUGHT, NOW + FINAL],
        ),
        (MUST, None, [NOW, THOUGHT + RAIN], [FINAL]),
        (ToolUse(tools=OFFERED, must_call=True, only=("now",)), None, [NOW], [RAIN]),
        (TOOLS, NUMBER, [final("17"), THOUGHT + NOW], [FINAL, "17"]),
        (None, NUMBER, [THOUGHT + final("17")], [THOUGHT + FINAL, NOW]),
    ],
)
def test_answers_follow_the_tools(
    backend: tokenizers.Tokenizer,
    compiler: GrammarCompiler,
    use: ToolUse | None,
    answer: Grammar | None,
    good: list[str],
    bad: list[str],
) -> None:
    grammar = harmony_grammar(use, special_ids(backend), answer)
    assert grammar is not None
    assert [text for text in good if not accepts(backend, compiler, grammar, text)] == []
    assert [text for text in bad if accepts(backend, compiler, grammar, text)] == []


@pytest.mark.parametrize(
    ("wanted", "good", "bad"),
    [
        ({"choice": ["a", "assistant", 'a "b"\n']}, ["a", "assistant", 'a "b"\n'], ["b", ""]),
        ({"regex": r"[0-9]+/[a-z]\/\n?"}, ["12/x/", "1/x/\n"], ["12", "/x/", "1\\/x/"]),
        ({"regex": "a\nb|c"}, ["a\nb", "c"], ["ab"]),
        ({"grammar": 'start: A+ "x"\nA: /[}{]/\n%ignore / +/'}, ["{} x", "{  } x"], ["x", "a"]),
        ({"grammar": 'start: "x" " y"\n%ignore / +/'}, ["x y"], ["y"]),
        ({"json": {"type": "integer"}}, ["3"], ["three"]),
    ],
)
def test_structured_output_is_for_the_final_channel(
    backend: tokenizers.Tokenizer,
    compiler: GrammarCompiler,
    wanted: dict[str, object],
    good: list[str],
    bad: list[str],
) -> None:
    grammar = harmony_grammar(None, special_ids(backend), make_grammar(None, None, wanted))
    assert grammar is not None
    assert grammar.field == f"structured_outputs.{next(iter(wanted))}"
    for text in good:
        assert accepts(backend, compiler, grammar, final(text)), text
        assert accepts(backend, compiler, grammar, THOUGHT + final(text)), text
        assert not accepts(backend, compiler, grammar, text), text
    assert [text for text in bad if accepts(backend, compiler, grammar, final(text))] == []


@pytest.mark.parametrize(
    ("opened", "use", "answer", "good", "bad"),
    [
        (WITHIN_FINAL, None, NUMBER, ["17"], [final("17"), "x"]),
        (
            WITHIN_FINAL,
            TOOLS,
            None,
            ["and so", f"so{NEXT}{THOUGHT}{NOW}"],
            [NOW, f"so{NEXT}{FINAL}"],
        ),
        (WITHIN_FINAL, TOOLS, NUMBER, ["17", f"so{NEXT}{NOW}"], ["so"]),
        (WITHIN_FINAL, MUST, None, [f"so{NEXT}{NOW}", f"{NEXT}{THOUGHT}{NOW}"], ["so", NOW]),
        (WITHIN_THOUGHT, None, NUMBER, [f"so{NEXT}{final('17')}"], ["17", final("17")]),
        (WITHIN_THOUGHT, TOOLS, None, [f"so{NEXT}{FINAL}", f"so{NEXT}{NOW}"], ["so", NOW]),
        ("", TOOLS, None, [f"{OPENED}{FINAL}", f"{OPENED}{NOW}"], [FINAL, NOW]),
    ],
)
def test_answers_begin_where_the_prompt_ends(
    backend: tokenizers.Tokenizer,
    compiler: GrammarCompiler,
    opened: str,
    use: ToolUse | None,
    answer: Grammar | None,
    good: list[str],
    bad: list[str],
) -> None:
    grammar = harmony_grammar(use, special_ids(backend), answer, opened)
    assert grammar is not None
    assert [text for text in good if not accepts(backend, compiler, grammar, text)] == []
    assert [text for text in bad if accepts(backend, compiler, grammar, text)] == []


@pytest.mark.parametrize("opened", [START, f"{OPENED}{CHANNEL}", f"{OPENED}{CHANNEL}final"])
def test_a_prompt_that_ends_within_a_header_has_no_grammar(opened: str) -> None:
    marks = dict.fromkeys(SPECIAL_TOKENS, 1)
    assert harmony_grammar(None, marks, None, opened) is None
    for use, answer, field in ((TOOLS, None, "tools"), (None, NUMBER, NUMBER.field)):
        with pytest.raises(RequestError, match="a prompt that ends within a header") as caught:
            harmony_grammar(use, marks, answer, opened)
        assert caught.value.param == field


def special_ids(backend: tokenizers.Tokenizer) -> dict[str, int]:
    return {mark: backend.get_vocab()[mark] for mark in SPECIAL_TOKENS}


def accepts(
    backend: tokenizers.Tokenizer, compiler: GrammarCompiler, grammar: Grammar, text: str
) -> bool:
    """Whether an answer may be ``text``, as a whole."""
    state = compiler.compile(grammar).start()
    for token in [*backend.encode(text, add_special_tokens=False).ids, EOS_ID]:
        if not bool(state.mask().allowed[token]):
            return False
        state.advance(token)
    return True


def test_a_vocabulary_without_the_marks_has_no_grammar_of_its_own() -> None:
    assert harmony_grammar(None, dict.fromkeys(SPECIAL_TOKENS, 1), None) is None
    assert harmony_grammar(None, {}, None) is None
    assert harmony_grammar(None, {}, NUMBER) is NUMBER
    assert harmony_grammar(None, {}, WORDS) is WORDS
    assert harmony_grammar(TOOLS, {}, None) is None
    for use, answer, field in ((MUST, None, "tool_choice"), (TOOLS, NUMBER, "response_format")):
        with pytest.raises(RequestError, match="needs a model with the special tokens") as caught:
            harmony_grammar(use, {}, answer)
        assert caught.value.param == field


def test_each_error_names_its_field() -> None:
    marks = dict.fromkeys(SPECIAL_TOKENS, 1)
    with pytest.raises(RequestError, match=r"structured_outputs\.regex cannot be used with tools"):
        harmony_grammar(TOOLS, marks, WORDS)
    large = Tool(name="f", parameters={"properties": {"x" * MAX_GRAMMAR_BYTES: {}}})
    with pytest.raises(RequestError, match=r"^tools have \d+ bytes of schemas"):
        harmony_grammar(ToolUse(tools=(large,)), marks, None)


@pytest.mark.parametrize("use", [None, TOOLS])
def test_a_response_format_of_any_allowed_size_is_taken(use: ToolUse | None) -> None:
    """What the format adds counts neither for it nor for the tools."""
    empty = len(json.dumps({"const": ""}, separators=(",", ":")))
    schema = {"const": "x" * (MAX_GRAMMAR_BYTES - empty)}
    answer = make_grammar("json_schema", schema, {})
    assert harmony_grammar(use, dict.fromkeys(SPECIAL_TOKENS, 1), answer) is not None
