"""Ids of calls in the form that a chat template asks for, in answers and in what clients send."""

from __future__ import annotations

import re
from typing import Any

import pytest

from gateway.core.tool_use import Tool, ToolCallFormat, ToolUse
from gateway.text.chat_template import ChatTemplate
from gateway.text.tool_formats.answer_parser import AnswerParser
from gateway.text.tool_formats.call_ids import CallIdGenerator, conversation_call_ids, fit_call_ids
from tests.gateway.fakes import saying, tiny_tokenizer
from tests.gateway.stack import MODEL, post, running_stack
from tests.gateway.text.tool_formats.examples import written

MISTRAL = re.compile(r"[a-zA-Z0-9]{9}")
USE = ToolUse(tools=(Tool(name="f"), Tool(name="g")))
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{% if m.tool_calls %}[TOOL_CALLS]{% for c in m.tool_calls %}"
    "{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('9') }}{% endif %}"
    "{{ c.function.name }} {{ c.id }};{% endfor %}"
    "{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id | length != 9 %}{{ raise_exception('9') }}{% endif %}"
    "{{ m.content }} {{ m.tool_call_id }};{% else %}{{ m.content }};{% endif %}{% endfor %}"
)


def called(*ids: str | None) -> dict[str, Any]:
    """An assistant's message with a call of ``f`` for each id."""
    calls: list[dict[str, Any]] = []
    for one in ids:
        named = {} if one is None else {"id": one}
        calls.append({**named, "type": "function", "function": {"name": "f", "arguments": {}}})
    return {"role": "assistant", "content": "", "tool_calls": calls}


def result(call_id: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def ids_of(form: ToolCallFormat, text: str, used: tuple[str, ...] = ()) -> list[str | None]:
    parser = AnswerParser(form, USE, None, used)
    return [call.call_id for call in parser.feed(text, is_last=True).merge_calls().calls]


def test_mistral_has_nine_letters_and_digits() -> None:
    found = ids_of(
        ToolCallFormat.MISTRAL, written(ToolCallFormat.MISTRAL, [("f", {}), ("g", {}), ("f", {})])
    )
    assert len(set(found)) == 3
    assert all(one is not None and MISTRAL.fullmatch(one) for one in found)


def test_kimi_counts_over_the_conversation() -> None:
    twice = written(ToolCallFormat.KIMI, [("f", {}), ("f", {})]).replace("f:1", "f:0")
    assert ids_of(ToolCallFormat.KIMI, twice) == ["functions.f:0", "functions.f:1"]
    used = ("functions.f:0", "functions.g:4")
    assert ids_of(ToolCallFormat.KIMI, twice, used) == ["functions.f:5", "functions.f:6"]
    going_on = written(ToolCallFormat.KIMI, [("g", {})]).replace("g:0", "g:5")
    assert ids_of(ToolCallFormat.KIMI, going_on, used) == ["functions.g:5"]


def test_kimi_counts_on_after_the_highest_number_that_is_read() -> None:
    ids = CallIdGenerator(ToolCallFormat.KIMI, [f"functions.f:{10**9 - 1}"])
    made = [ids.new("f"), ids.new("f", "0"), ids.new("f", "0"), ids.new("f")]
    numbers = [10**9, 0, 10**9 + 1, 10**9 + 2]
    assert made == [f"functions.f:{number}" for number in numbers]


@pytest.mark.parametrize("form", [ToolCallFormat.HERMES, ToolCallFormat.GLM, None])
def test_other_forms_keep_what_clients_send(form: ToolCallFormat | None) -> None:
    messages = [called("call_1", "x"), result("x", "2"), result("call_1", "1")]
    assert fit_call_ids(messages, form) is messages


@pytest.mark.parametrize(
    ("form", "pattern"),
    [(ToolCallFormat.MISTRAL, MISTRAL), (ToolCallFormat.KIMI, re.compile(r"functions\.f:[0-9]+"))],
)
def test_ids_of_other_servers_are_mapped_with_their_results(
    form: ToolCallFormat, pattern: re.Pattern[str]
) -> None:
    messages = [
        called("call_abcdefghijklmnopqrstuvwx", "toolu_01"),
        result("toolu_01", "second"),
        result("call_abcdefghijklmnopqrstuvwx", "first"),
        called(None),
    ]
    shown = fit_call_ids(messages, form)
    first, second = (call["id"] for call in shown[0]["tool_calls"])
    (third,) = (call["id"] for call in shown[3]["tool_calls"])
    assert len({first, second, third}) == 3
    assert all(pattern.fullmatch(one) for one in (first, second, third))
    assert [message.get("tool_call_id") for message in shown[1:3]] == [second, first]
    assert fit_call_ids(messages, form) == shown, "the prompt's beginning stays the same"
    assert set(conversation_call_ids(messages, form)) == {first, second, third}


@pytest.mark.parametrize("form", [ToolCallFormat.MISTRAL, ToolCallFormat.KIMI])
def test_fitting_ids_stay_and_equal_ones_are_told_apart(form: ToolCallFormat) -> None:
    own = "abcDEF123" if form is ToolCallFormat.MISTRAL else "functions.f:0"
    messages = [called(own, own), result(own, "a"), result(own, "b")]
    shown = fit_call_ids(messages, form)
    first, second = (call["id"] for call in shown[0]["tool_calls"])
    assert first == own != second
    assert [message["tool_call_id"] for message in shown[1:]] == [first, second]


def test_a_template_that_demands_nine_letters_takes_any_conversation() -> None:
    template = ChatTemplate(TEMPLATE)
    messages = [{"role": "user", "content": "go"}, called("toolu_01"), result("toolu_01", "7")]
    found = re.search(r"f ([a-zA-Z0-9]{9});7 ([a-zA-Z0-9]{9});", template.render(messages))
    assert found is not None
    assert found[1] == found[2]


def test_drawn_ids_differ_from_used_ones() -> None:
    ids = CallIdGenerator(ToolCallFormat.MISTRAL)
    assert len({ids.new("f") for _ in range(500)}) == 500


def test_every_protocol_has_the_ids_of_the_template() -> None:
    """Ids of another server are taken, and those of an answer fit the next turn."""
    function = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    flat, user = {"type": "function", **function}, {"role": "user", "content": "go"}
    messages = [user, called("call_of_another_server"), result("call_of_another_server", "7")]
    messages[1]["tool_calls"][0]["function"]["arguments"] = "{}"
    with running_stack(tokenizer=tiny_tokenizer(TEMPLATE)) as stack:
        stack.engine.script = saying(written(ToolCallFormat.MISTRAL, [("f", {}), ("f", {})]))
        tools = [{"type": "function", "function": function}]
        chat = post(stack, "/v1/chat/completions", messages=messages, tools=tools).json()
        calls = chat["choices"][0]["message"]["tool_calls"]
        assert len({call["id"] for call in calls}) == 2
        assert all(MISTRAL.fullmatch(call["id"]) for call in calls)

        response = post(stack, "/v1/responses", input="go", tools=[flat]).json()
        items = response["output"]
        assert all(MISTRAL.fullmatch(item["call_id"]) for item in items)
        outputs = [
            {"type": "function_call_output", "call_id": item["call_id"], "output": "7"}
            for item in items
        ]
        going_on = post(stack, "/v1/responses", input=[user, *items, *outputs], tools=[flat])
        assert going_on.status_code == 200, going_on.text

        offered = [{"name": "f", "input_schema": function["parameters"]}]
        fields: dict[str, Any] = {"model": MODEL, "max_tokens": 99, "tools": offered}
        message = post(stack, "/v1/messages", messages=[user], **fields).json()
        blocks = message["content"]
        assert all(MISTRAL.fullmatch(block["id"]) for block in blocks)
        results = [
            {"type": "tool_result", "tool_use_id": block["id"], "content": "7"} for block in blocks
        ]
        turns = [
            user,
            {"role": "assistant", "content": blocks},
            {"role": "user", "content": results},
        ]
        going_on = post(stack, "/v1/messages", messages=turns, **fields)
        assert going_on.status_code == 200, going_on.text
