"""Answers divided into reasoning, content and calls, form by form."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.core.thinking import Thinking, thinking_after
from gateway.core.tool_use import CallArguments, Tool, ToolCallFormat, ToolUse
from gateway.text.chat_template import ChatTemplate
from gateway.text.tool_formats.answer_parser import AnswerParser
from gateway.text.tool_formats.call_syntax import SYNTAXES
from gateway.text.tool_formats.lookahead import MAX_WAITING_CHARS
from gateway.text.tool_formats.tool_calls import CallDelta, ParsedPiece, ParsedText
from tests.gateway.text.tool_formats.examples import MARKS, USE, WEATHER, read, written
from tests.harness.tiers import quick_rows

pytestmark = pytest.mark.heavy

FORMS = sorted(SYNTAXES, key=lambda form: form.name)
QUICK = {ToolCallFormat.HERMES, ToolCallFormat.GLM}
PAIR_FORMS = [form for form in FORMS if SYNTAXES[form].pairs is not None]
ARGUMENTS: dict[str, Any] = {
    "city": 'Bad "Ems" }]\\ \n<b> 日本',
    "days": 3,
    "units": "metric",
    "where": None,
    "places": [{"name": "a < b"}],
    "is_short": True,
    "note": {"a": [1.5]},
}
SIZES = (1, 2, 3, 7, 10_000)
Parts = list[tuple[str, str]]


def parsed(
    text: str,
    form: ToolCallFormat | None = None,
    thinking: Thinking | None = None,
    use: ToolUse = USE,
) -> tuple[Parts, bool]:
    """What an answer is, however it is cut."""
    found = [
        read(
            AnswerParser(form, use if form else None, thinking),
            [text[start : start + size] for start in range(0, len(text), size)],
        )
        for size in SIZES
    ]
    assert [one for one in found if one != found[0]] == []
    whole = AnswerParser(form, use if form else None, thinking)
    assert read(_AtOnce(whole), [text]) == found[0]
    return found[0]


class _AtOnce:
    """A parser that gets all of an answer with its end."""

    def __init__(self, parser: AnswerParser) -> None:
        self._parser = parser
        self._text = ""

    @property
    def has_calls(self) -> bool:
        return self._parser.has_calls

    def feed(self, text: str, is_last: bool = False) -> ParsedPiece:
        self._text += text
        return self._parser.feed(self._text, True) if is_last else ParsedPiece("")


# ---- calls ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_calls_are_found_in_every_form(form: ToolCallFormat) -> None:
    calls = written(form, [("weather", ARGUMENTS), ("now", {})])
    parts, has_calls = parsed(f"On it.\n{calls}", form)
    assert has_calls
    assert [kind for kind, _ in parts] == ["content", "0 weather", "1 now"]
    assert parts[0][1] == "On it.\n"
    assert [json.loads(arguments) for _, arguments in parts[1:]] == [ARGUMENTS, {}]


@pytest.mark.parametrize("form", FORMS)
def test_white_space_between_marks_does_not_matter(form: ToolCallFormat) -> None:
    """Versions of a model differ in it, GLM-4.6 and 4.7 for example."""
    calls = written(form, [("weather", {"city": "x", "days": 3}), ("now", {})])
    bare = calls.replace("\n", "")
    if form is ToolCallFormat.HERMES:
        bare = bare.replace('": ', '" :\n').replace("{", " {").replace("}", " }")
    parts, has_calls = parsed(bare, form)
    assert has_calls
    assert [json.loads(arguments) for _, arguments in parts] == [{"city": "x", "days": 3}, {}]


@pytest.mark.parametrize("form", FORMS)
def test_a_function_that_was_not_offered_is_content(form: ToolCallFormat) -> None:
    text = written(form, [("never", {"city": "x"})])
    assert parsed(text, form) == ([("content", text)], False)
    only_now = ToolUse(tools=USE.tools, must_call=True, only=("now",))
    text = written(form, [("weather", {"city": "x"})])
    assert parsed(text, form, use=only_now) == ([("content", text)], False)


@pytest.mark.parametrize("form", FORMS)
def test_marks_without_a_call_are_content(form: ToolCallFormat) -> None:
    mark = SYNTAXES[form].first_delimiter
    for text in (f"{mark} x", f"a {mark}", f"{mark}{mark}", f"a {mark[:-1]}", f"{mark}\n\n", mark):
        assert parsed(text, form) == ([("content", text)], False)
    call = written(form, [("now", {})])
    assert parsed(f"{mark} {call}", form) == ([("content", f"{mark} "), ("0 now", "{}")], True)


@pytest.mark.parametrize("form", FORMS)
def test_text_behind_a_call_is_content(form: ToolCallFormat) -> None:
    call = written(form, [("now", {})])
    behind = [("content", "\n\n")] if SYNTAXES[form].section else []
    assert parsed(f"{call}\n\n", form) == ([("0 now", "{}"), *behind], True)
    parts, has_calls = parsed(f"{call}\n and more", form)
    assert has_calls
    assert parts == [("0 now", "{}"), ("content", "\n and more")]


@pytest.mark.parametrize("form", FORMS)
def test_every_cut_of_a_call_keeps_its_text(form: ToolCallFormat) -> None:
    """Up to its head it is content, then arguments; it is complete when they are. Where the answer
    must be a call, it is none until its function is known."""
    call = written(form, [("weather", {"city": "Ems", "days": 3})])
    must_call = ToolUse(tools=USE.tools, must_call=True)
    for end in range(len(call)):
        parts, has_calls = parsed(call[:end], form)
        if parts and parts[0][0] == "content":
            assert parts == [("content", call[:end])]
            assert not has_calls
            names_it = "w" in call[:end]
            begun = [("0 weather", "")] if names_it else []
            assert parsed(call[:end], form, use=must_call) == (begun, False)
        elif parts:
            ((kind, arguments),) = parts
            assert kind == "0 weather"
            assert '{"city": "Ems", "days": 3}'.startswith(arguments) or not has_calls
            assert has_calls is (arguments == '{"city": "Ems", "days": 3}')


@pytest.mark.parametrize("form", quick_rows(QUICK, FORMS))
def test_a_cut_value_is_the_beginning_of_the_whole_one(form: ToolCallFormat) -> None:
    """Also where it is no text: clients that read cut JSON get its type right."""
    arguments = {
        "city": "Ems",
        "days": 13,
        "is_short": True,
        "places": [{"name": 'a "b" c'}],
        "where": "[at] home",
    }
    call = written(form, [("now", {}), ("weather", arguments)])
    whole = dict(parsed(call, form)[0])["1 weather"]
    for end in range(len(call)):
        said = dict(parsed(call[:end], form)[0]).get("1 weather", "")
        assert whole.startswith(said), said


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "<tool_call>weather\n<arg_key>city</arg_key>junk",
            [("0 weather", ""), ("content", "<arg_key>city</arg_key>junk")],
        ),
        (
            "<tool_call>weather\n<arg_key>city</arg_key><arg_value>x</arg_value>junk</tool_call>",
            [("0 weather", '{"city": "x"'), ("content", "junk</tool_call>")],
        ),
        ("<tool_call>weather\n<arg_key>ci", [("0 weather", '{"ci')]),
        ("<tool_call>weather\n<arg_key>ci</ar", [("0 weather", '{"ci')]),
        (
            "<tool_call>weather\n<arg_key>city</arg_key><arg_value>a</arg",
            [("0 weather", '{"city": "a')],
        ),
        ("<tool_call>weather\n<arg_key>days</arg_key><arg_value>1", [("0 weather", '{"days": 1')]),
        ("<tool_call>weather\n</tool_call", [("content", "<tool_call>weather\n</tool_call")]),
    ],
)
def test_arguments_that_break_off(text: str, parts: Parts) -> None:
    assert parsed(text, ToolCallFormat.GLM) == (parts, False)


def test_a_call_whose_end_is_missing_is_complete_with_its_arguments() -> None:
    call = written(ToolCallFormat.HERMES, [("now", {})])
    assert parsed(call.removesuffix("\n</tool_call>"), ToolCallFormat.HERMES) == (
        [("0 now", "{}")],
        True,
    )
    text = call.replace("\n</tool_call>", " so")
    assert parsed(text, ToolCallFormat.HERMES) == ([("0 now", "{}"), ("content", " so")], True)


@pytest.mark.parametrize("form", FORMS)
def test_no_client_waits_for_long_for_the_end_of_a_head(form: ToolCallFormat) -> None:
    mark = SYNTAXES[form].first_delimiter
    text = f"{mark}{' ' * 3000}x"
    assert parsed(text, form) == ([("content", text)], False)
    parser = AnswerParser(form, USE)
    shown = "".join(parser.feed(char).content for char in text)
    assert len(text) - len(shown) < MAX_WAITING_CHARS + len(mark)


def test_kimi_names_calls_itself() -> None:
    text = written(ToolCallFormat.KIMI, [("now", {}), ("weather", {"city": "x"})])
    calls = AnswerParser(ToolCallFormat.KIMI, USE).feed(text, True).merge_calls().calls
    assert [call.call_id for call in calls] == ["functions.now:0", "functions.weather:1"]
    other = AnswerParser(ToolCallFormat.GLM, USE).feed(
        written(ToolCallFormat.GLM, [("now", {})]), True
    )
    assert str(other.calls[0].call_id).startswith("call_")


# ---- values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", PAIR_FORMS)
@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "3", "3"),
        ({"type": "string"}, '"x"', '"x"'),
        ({"type": "string"}, "null", "null"),
        ({"type": "string"}, " a\n\n b ", " a\n\n b "),
        ({"type": "integer"}, " 3 ", 3),
        ({"type": "integer"}, "three", "three"),
        ({"type": "integer"}, '"3"', '"3"'),
        ({"type": "number"}, "1e3", 1000.0),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "False", False),
        ({"type": "boolean"}, "yes", "yes"),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "None", None),
        ({"type": ["string", "null"]}, "5", "5"),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "5", 5),
        ({"type": "array"}, "[1, {}]", [1, {}]),
        ({"type": "object"}, "[1]", "[1]"),
        ({"type": "array"}, "[1,", "[1,"),
        ({"$ref": "#/$defs/n"}, "7", 7),
        ({"$ref": "#/$defs/missing"}, "7", 7),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({"const": None}, "null", None),
        ({"type": "integer", "nullable": True}, "null", None),
        ({"allOf": [{"type": "integer"}]}, "1", 1),
        ({}, '{"a": 1}', {"a": 1}),
        ({}, "plain", "plain"),
        ({}, "", ""),
        ({"type": "odd"}, "1", 1),
        (None, "1", 1),
    ],
)
def test_values_are_of_the_types_that_the_schema_asks_for(
    form: ToolCallFormat, schema: dict[str, Any] | None, text: str, value: object
) -> None:
    properties = {} if schema is None else {"a": schema}
    parameters = {"properties": properties, "$defs": {"n": {"type": "integer"}}}
    use = ToolUse(tools=(Tool(name="f", parameters=parameters),))
    said = written(form, [("f", {"a": "?"})]).replace('string="true"', 'string="false"')
    ((_, arguments),), has_calls = parsed(said.replace("?", text), form, use=use)
    assert has_calls
    assert json.loads(arguments) == {"a": value}


def test_deepseek_says_itself_what_a_string_is() -> None:
    use = ToolUse(tools=(Tool(name="f", parameters={"properties": {"n": {"type": "integer"}}}),))
    said = written(ToolCallFormat.DEEPSEEK_V3_2, [("f", {"a": "1", "b": 1, "n": "2"})])
    ((_, arguments),), _ = parsed(said, ToolCallFormat.DEEPSEEK_V3_2, use=use)
    assert json.loads(arguments) == {"a": "1", "b": 1, "n": 2}


def test_strings_are_passed_on_as_they_come() -> None:
    """A file that is written by a call may be long."""
    parser = AnswerParser(ToolCallFormat.QWEN_CODER, USE)
    head = "<tool_call>\n<function=weather>\n<parameter=city>\nBad"
    assert parser.feed(head).calls[-1] == CallDelta(0, '"Bad')
    assert parser.feed(' "Ems"\n').calls == (CallDelta(0, ' \\"Ems\\"'),)
    assert parser.feed("x").calls == (CallDelta(0, "\\nx"),)


# ---- reasoning ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("thinking", "text", "parts"),
    [
        (Thinking.POSSIBLE, "<think>\nHm.\n\n</think>\n\nYes.", ["Hm.", "Yes."]),
        (Thinking.POSSIBLE, "\n<think>Hm.</think>Yes.", ["Hm.", "Yes."]),
        (Thinking.POSSIBLE, "<think></think>Yes.\n", ["", "Yes.\n"]),
        (Thinking.POSSIBLE, "<think>\n\n</think>\n\nYes.", ["", "Yes."]),
        (Thinking.POSSIBLE, "Yes.</think>", ["", "Yes.</think>"]),
        (Thinking.POSSIBLE, " Yes. <think>x</think>", ["", " Yes. <think>x</think>"]),
        (Thinking.POSSIBLE, "<thin", ["", "<thin"]),
        (Thinking.POSSIBLE, "<think>Hm.\n", ["Hm.\n", ""]),
        (Thinking.POSSIBLE, "<think>a </thi", ["a </thi", ""]),
        (Thinking.POSSIBLE, "", ["", ""]),
        (Thinking.OPEN, "\nHm.\na\n</think>\n\nYes.", ["Hm.\na", "Yes."]),
        (Thinking.OPEN, "<think>\nHm.</think>Yes.", ["Hm.", "Yes."]),
        (Thinking.OPEN, "Hm. <think> x", ["Hm. <think> x", ""]),
        (Thinking.OPEN, "a</think>b</think>c", ["a", "b</think>c"]),
        (Thinking.OPEN, "<th", ["<th", ""]),
        (Thinking.OPEN, "</think>", ["", ""]),
        (None, "<think>a</think>", ["", "<think>a</think>"]),
    ],
)
def test_reasoning_is_told_apart(thinking: Thinking | None, text: str, parts: list[str]) -> None:
    reasoning, content = parts
    expected = [("reasoning", reasoning)] * bool(reasoning) + [("content", content)] * bool(content)
    assert parsed(text, None, thinking) == (expected, False)


@pytest.mark.parametrize("form", FORMS)
def test_calls_behind_reasoning_and_within(form: ToolCallFormat) -> None:
    call, mark = written(form, [("now", {})]), SYNTAXES[form].first_delimiter
    thought = [("reasoning", f"A {mark} is"), ("0 now", "{}")]
    text = f"A {mark} is\n</think>\n\n{call}"
    assert parsed(text, form, Thinking.OPEN) == (thought, True)
    assert parsed(f"<think>\n{text}", form, Thinking.POSSIBLE) == (thought, True)
    # some models call without ending their reasoning
    assert parsed(f"A {mark} is\n{call}", form, Thinking.OPEN) == (thought, True)
    before = [("reasoning", "A"), ("content", "So: "), ("0 now", "{}")]
    assert parsed(f"A</think>So: {call}", form, Thinking.OPEN) == (before, True)
    must_call = ToolUse(tools=USE.tools, must_call=True)
    cut = f"A {mark[:-1]}"
    assert parsed(cut, form, Thinking.OPEN, must_call) == ([("reasoning", cut)], False)
    assert parsed(f"A</think>{mark[:-1]}", form, Thinking.OPEN, must_call)[0] == [
        ("reasoning", "A")
    ]


@pytest.mark.parametrize(
    ("prompt", "open_message", "expected"),
    [
        ("<|assistant|>", None, Thinking.POSSIBLE),
        ("<|assistant|><think>\n", None, Thinking.OPEN),
        ("<|assistant|>\n<think>\n\n</think>\n\n", None, None),
        ("<|assistant|></think>", None, None),
        ("What is <think>?<|assistant|>", None, Thinking.POSSIBLE),
        ("<|assistant|><think>a", "<think>a", Thinking.OPEN),
        ("<|assistant|><think>a</think>b", "<think>a</think>b", None),
        ("<|assistant|>b", "b", None),
    ],
)
def test_the_prompt_says_where_reasoning_begins(
    prompt: str, open_message: str | None, expected: Thinking | None
) -> None:
    assert thinking_after(prompt, open_message) is expected


# ---- templates ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "shown"),
    [
        *(
            (form, " ".join(MARKS[form]))
            for form in FORMS
            if form is not ToolCallFormat.DEEPSEEK_V3
        ),
        (ToolCallFormat.DEEPSEEK_V3, f"{' '.join(MARKS[ToolCallFormat.DEEPSEEK_V3])} ```json"),
        (ToolCallFormat.DEEPSEEK_V3_2, "<{{ dsml }}function_calls> {% set dsml = '｜DSML｜' %}"),
        (ToolCallFormat.HARMONY, "<|channel|> <tool_call>"),
    ],
)
def test_forms_are_read_from_templates(form: ToolCallFormat, shown: str) -> None:
    template = ChatTemplate("{{ tools }}" + shown)
    assert template.tool_format is form
    assert not template.has_thinking
    assert ChatTemplate("{{ tools }}" + shown + "</think>").has_thinking


def test_templates_may_read_arguments_as_text_and_as_an_object() -> None:
    """Those of DeepSeek add the text to their marks."""
    call = {"function": {"name": "f", "arguments": CallArguments({"a": 1}, '{"a":1}')}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    source = (
        "{% for call in messages[0].tool_calls %}{{ 'A' + call.function.arguments + 'B' }}"
        "{{ call.function.arguments | tojson }}{{ call.function.arguments.a }}{% endfor %}"
    )
    assert ChatTemplate(source).render([message]) == 'A{"a":1}B{"a": 1}1'


def test_parts_come_in_the_order_of_the_answer() -> None:
    call = written(ToolCallFormat.GLM, [("now", {})])
    piece = AnswerParser(ToolCallFormat.GLM, USE, Thinking.OPEN).feed(f"a</think>b{call}c", True)
    assert (piece.reasoning, piece.content) == ("a", "bc")
    kinds = [
        part.text if isinstance(part, ParsedText) else part.index for part in piece.ordered_parts()
    ]
    assert kinds == ["a", "b", 0, 0, "c"]
    assert ParsedPiece("b", (), "a").ordered_parts() == (ParsedText("a", True), ParsedText("b"))


def test_the_weather_schema_is_one() -> None:
    """A mistake in the examples would make the tests of values say less."""
    assert set(ARGUMENTS) == set(WEATHER["properties"])
