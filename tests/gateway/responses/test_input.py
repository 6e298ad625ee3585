"""From bodies to prompts: items, instructions, tools, and what is wrong with them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.core.errors import RequestError, UnsupportedParameterError
from gateway.core.messages import PHASE
from gateway.http.parse import parse_body
from gateway.responses.checked_request import CheckedRequest, check_response_body
from gateway.responses.conversation import ConversationBuilder, rename_error_fields
from gateway.responses.items import ItemIdGenerator, encode_reasoning, read_item, response_id_of
from gateway.responses.schema import InputItem, ResponseBody
from gateway.responses.tools import CustomInputReader
from gateway.responses.unsupported import RENAMED_FIELDS, UNSUPPORTED
from gateway.text.chat_template import ChatTemplate
from gateway.text.harmony.template import HarmonyTemplate
from tests.gateway.fakes import BACKEND, EOS, MAX_MODEL_LEN, saying, tiny_tokenizer
from tests.gateway.responses.streams import PATH, respond
from tests.gateway.responses.test_streams import NOW, PATCH, WEATHER
from tests.gateway.stack import Stack, post, running_stack
from workers.requests.request import GrammarKind

pytestmark = pytest.mark.heavy

RESPONSE_ID = "resp_" + "0" * 32
USER = {"role": "user", "content": "hi"}
CALL = {"type": "function_call", "call_id": "c1", "name": "now", "arguments": '{"a":1}'}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "noon"}
THOUGHT = {
    "type": "reasoning",
    "summary": [],
    "content": [{"type": "reasoning_text", "text": "so"}],
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def turn_of(**body: Any) -> CheckedRequest:
    return check_response_body(parse_body(ResponseBody, body), ItemIdGenerator(RESPONSE_ID))


def messages_of(*items: dict[str, Any], **body: Any) -> list[dict[str, Any]]:
    """The messages of some items, as chat templates see them."""
    chat = turn_of(input=list(items), **body).call.chat
    assert chat is not None
    return [dict(message) for message in chat.messages]


def said(role: str, *texts: str, kind: str = "input_text") -> dict[str, Any]:
    return {"role": role, "content": [{"type": kind, "text": text} for text in texts]}


def test_instructions_and_reasoning_are_joined_once() -> None:
    """Not at each item, which would copy all texts before it."""
    conversation, ids = ConversationBuilder(), ItemIdGenerator(RESPONSE_ID)
    for place in range(1000):
        conversation.add_instructions(f"{place}", "input")
    for _ in range(1000):
        item = read_item(InputItem.model_validate(THOUGHT), "input", ids)
        conversation.add(item, "input")
    pieces = [conversation.messages[0]["content"], conversation.messages[1]["reasoning_content"]]
    assert [len(one) for one in pieces] == [1000, 1000]
    assert all(isinstance(one, list) for one in pieces)
    first, second = conversation.finish()
    assert first == {"role": "system", "content": "\n\n".join(map(str, range(1000)))}
    assert second["reasoning_content"] == "\n".join(["so"] * 1000)


@pytest.mark.parametrize(("strict", "expected"), [(None, False), (False, False), (True, True)])
def test_tools_are_strict_where_they_say_so(strict: bool | None, expected: bool) -> None:
    use = turn_of(input="hi", tools=[{**WEATHER, "strict": strict}]).call.tools
    assert use is not None
    assert [tool.is_strict for tool in use.tools] == [expected]


def test_a_call_that_was_cut_is_no_part_of_the_conversation() -> None:
    cut = {**CALL, "id": "fc_1", "status": "incomplete", "arguments": '{"a":'}
    message = said("user", "go on")
    body = parse_body(ResponseBody, {"input": "go on", "previous_response_id": RESPONSE_ID})
    stored = check_response_body(body, ItemIdGenerator(RESPONSE_ID), [cut]).call.chat
    sent = turn_of(input=[cut, message]).call.chat
    for chat in (stored, sent):
        assert chat is not None
        assert [message["role"] for message in chat.messages] == ["user"]


# ---- conversations --------------------------------------------------------------------------


def test_a_text_is_a_message_of_the_user(stack: Stack) -> None:
    stack.engine.script = saying("hello")
    respond(stack, input="hi", instructions="be brief")
    (request,) = stack.engine.requests
    expected = f"<|system|>be brief{EOS}\n<|user|>hi{EOS}\n<|assistant|>"
    assert request.prompt == tuple(BACKEND.encode(expected).ids)


def test_instructions_at_the_beginning_are_one_message() -> None:
    items = [said("developer", "b"), said("system", "c", "d"), USER, said("developer", "e"), USER]
    assert messages_of(*items, instructions="a") == [
        {"role": "system", "content": "a\n\nb\n\nc\nd"},
        {"role": "user", "content": "hi"},
        {"role": "system", "content": "e"},
        {"role": "user", "content": "hi"},
    ]


def test_what_an_assistant_did_is_one_message() -> None:
    answer = said("assistant", "I look.", kind="output_text")
    messages = messages_of(USER, THOUGHT, answer, CALL, {**CALL, "call_id": "c2"}, OUTPUT)
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
    _, assistant, tool = messages
    assert (assistant["reasoning_content"], assistant["content"]) == ("so", "I look.")
    calls = assistant["tool_calls"]
    assert [call["id"] for call in calls] == ["c1", "c2"]
    assert calls[0]["function"] == {"name": "now", "arguments": {"a": 1}}
    assert calls[0]["function"]["arguments"].text == '{"a":1}'
    assert tool == {"role": "tool", "tool_call_id": "c1", "content": "noon"}
    assert PHASE not in assistant


def test_what_one_message_cannot_tell_is_two() -> None:
    answer = said("assistant", "I look.", kind="output_text")
    messages = messages_of(USER, THOUGHT, THOUGHT, answer, THOUGHT, CALL, OUTPUT, answer, answer)
    assert [(m["role"], m["content"], m.get(PHASE)) for m in messages] == [
        ("user", "hi", None),
        ("assistant", "I look.", "commentary"),
        ("assistant", "", None),
        ("tool", "noon", None),
        ("assistant", "I look.", "commentary"),
        ("assistant", "I look.", None),
    ]
    assert messages[1]["reasoning_content"] == "so\nso"
    assert messages[2]["reasoning_content"] == "so"


def test_phases_of_messages_are_kept() -> None:
    first = {**said("assistant", "a", kind="output_text"), "phase": "commentary"}
    second = {**said("assistant", "b", kind="output_text"), "phase": "final_answer"}
    messages = messages_of(first, second, {**USER, "phase": "commentary"})
    assert [m.get(PHASE) for m in messages] == ["commentary", "final_answer", None]


def test_harmony_has_a_channel_for_each_phase() -> None:
    commentary = {**said("assistant", "Wait.", kind="output_text"), "phase": "commentary"}
    answer = said("assistant", "Noon.", kind="output_text")
    template = HarmonyTemplate(today=lambda: "2025-06-28")
    before = messages_of(USER, THOUGHT, commentary, CALL, OUTPUT)
    text = template.render(before)
    assert "<|channel|>analysis<|message|>so<|end|>" in text
    assert "<|channel|>commentary<|message|>Wait.<|end|>" in text
    (words,) = messages_of(commentary)
    assert "<|channel|>commentary<|message|>Wait.<|end|>" in template.render([words])
    after = template.render(messages_of(USER, THOUGHT, commentary, THOUGHT, CALL, OUTPUT))
    assert after.count("<|channel|>analysis") == 2  # commentary ends no turn
    done = template.render(messages_of(USER, THOUGHT, answer, USER))
    assert "<|channel|>analysis" not in done
    assert "<|channel|>final<|message|>Noon.<|end|>" in done


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (
            {"content": [{"type": "reasoning_text", "text": "a"}, {"type": "text", "text": "b"}]},
            "a\nb",
        ),
        ({"content": [], "encrypted_content": encode_reasoning("é so")}, "é so"),
        ({"content": None, "encrypted_content": encode_reasoning("a"), "summary": []}, "a"),
        ({"summary": [{"type": "summary_text", "text": "short"}]}, "short"),
        ({"content": "plain", "encrypted_content": None}, "plain"),
    ],
)
def test_reasoning_comes_back_in_any_form(item: dict[str, Any], text: str) -> None:
    (message,) = messages_of({"type": "reasoning", **item})
    assert message["reasoning_content"] == text


def test_custom_calls_are_functions_with_one_argument() -> None:
    call = {"type": "custom_tool_call", "call_id": "c1", "name": "patch", "input": 'a "b"\n'}
    output = {
        "type": "custom_tool_call_output",
        "call_id": "c1",
        "output": [
            {"type": "input_text", "text": "done"},
            {"type": "input_text", "text": "well"},
        ],
    }
    assistant, tool = messages_of(call, output)
    (made,) = assistant["tool_calls"]
    assert made["function"] == {"name": "patch", "arguments": {"input": 'a "b"\n'}}
    assert json.loads(made["function"]["arguments"].text) == {"input": 'a "b"\n'}
    assert tool["content"] == "done\nwell"


def test_items_get_ids_that_name_their_response() -> None:
    own = {"type": "message", "id": "msg_mine", **USER}
    items = turn_of(input=[USER, own, THOUGHT, CALL, OUTPUT]).new_items
    assert items[1]["id"] == "msg_mine"
    made = [item["id"] for place, item in enumerate(items) if place != 1]
    assert {response_id_of(one) for one in made} == {RESPONSE_ID}
    assert [one.partition("_")[0] for one in made] == ["msg", "rs", "fc", "fco"]
    assert len(set(made)) == 4
    assert response_id_of("msg_mine") is None


def test_the_prompt_of_a_conversation_with_calls(tools: Stack) -> None:
    tools.engine.script = saying("fine")
    respond(tools, input=[USER, CALL, OUTPUT], tools=[WEATHER, NOW])
    (request,) = tools.engine.requests
    prompt = tiny_tokenizer().decode(request.prompt, False)
    assert prompt.startswith("tool weather\ntool now\n<|user|>hi")
    assert '<tool_call>\n{"name": "now", "arguments": {"a": 1}}\n</tool_call>' in prompt
    assert "<|user|>noon" in prompt


# ---- other fields ---------------------------------------------------------------------------


def test_fields_of_sampling_reach_the_engine(stack: Stack) -> None:
    stack.engine.script = saying("hello")
    sampling = {"temperature": 0.5, "top_p": 0.25, "top_k": 3, "min_p": 0.125, "seed": 7}
    penalties = {"presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.25}
    respond(stack, input="x", max_output_tokens=9, priority=4, **sampling, **penalties)
    (request,) = stack.engine.requests
    params = request.params
    assert {name: getattr(params, name) for name in (*sampling, *penalties)} == {
        **sampling,
        **penalties,
    }
    assert (params.max_tokens, request.priority, params.logprobs) == (9, 4, None)


def test_the_default_is_what_is_left_of_the_context(stack: Stack) -> None:
    assert respond(stack, input="x")["usage"]["total_tokens"] == MAX_MODEL_LEN


@pytest.mark.parametrize(
    ("text", "schema"),
    [
        ({"format": {"type": "text"}}, None),
        ({"format": {"type": "json_object"}}, '{"type":"object"}'),
        (
            {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": False}},
            json.dumps(SCHEMA, separators=(",", ":")),
        ),
    ],
)
def test_the_format_of_the_text(stack: Stack, text: dict[str, Any], schema: str | None) -> None:
    stack.engine.script = saying("{}")
    found = respond(stack, input="x", text=text)
    (request,) = stack.engine.requests
    grammar = request.params.grammar
    assert (None if grammar is None else grammar.text) == schema
    assert found["text"]["format"]["type"] == text["format"]["type"]
    assert found["text"]["format"].get("schema") == text["format"].get("schema")


def test_effort_and_verbosity_are_variables_of_the_template() -> None:
    template = "{{ reasoning_effort }} {{ verbosity }} {{ messages[0].content }}"
    with running_stack(tokenizer=tiny_tokenizer(template)) as stack:
        fields = {"reasoning": {"effort": "low"}, "text": {"verbosity": "high"}}
        respond(stack, input="hello", max_output_tokens=1, **fields)
        (request,) = stack.engine.requests
        assert request.prompt == tuple(BACKEND.encode("low high hello").ids)


@pytest.mark.parametrize(
    ("choice", "allowed", "must_call"),
    [
        ("auto", ["weather", "now", "patch"], False),
        ("required", ["weather", "now", "patch"], True),
        ({"type": "function", "name": "now"}, ["now"], True),
        ({"type": "custom", "name": "patch"}, ["patch"], True),
        (
            {
                "type": "allowed_tools",
                "mode": "auto",
                "tools": [{"type": "function", "name": "now"}, {"type": "custom", "name": "patch"}],
            },
            ["now", "patch"],
            False,
        ),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "weather"}],
            },
            ["weather"],
            True,
        ),
    ],
)
def test_which_tools_may_be_called(choice: Any, allowed: list[str], must_call: bool) -> None:
    turn = turn_of(input="x", tools=[WEATHER, NOW, PATCH], tool_choice=choice)
    use = turn.call.tools
    assert use is not None
    assert [tool.name for tool in use.tools] == ["weather", "now", "patch"]
    assert [tool.name for tool in use.allowed] == allowed
    assert (use.must_call, use.is_parallel) == (must_call, True)
    assert turn.repeated_fields["tool_choice"] == choice
    assert turn.tools.custom_names == {"patch"}


def test_calls_follow_a_grammar(tools: Stack) -> None:
    tools.engine.script = saying("x")
    respond(tools, input="x", tools=[WEATHER, PATCH], parallel_tool_calls=False)
    respond(tools, input="x", tools=[WEATHER], tool_choice="none")
    with_tools, without = tools.engine.requests
    assert with_tools.params.grammar is not None
    assert with_tools.params.grammar.kind is GrammarKind.LARK
    assert '"input"' in with_tools.params.grammar.text
    assert without.params.grammar is None
    assert "tool weather" not in tiny_tokenizer().decode(without.prompt, False)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"input": "a\\n\\"b\\" \\\\ \\u00e9 \\ud83d\\ude00 /\\/"}', 'a\n"b" \\ é 😀 //'),
        (' { "input" : "" } ', ""),
        ('{"input":"tab\tline\n"}', "tab\tline\n"),
        ('{"input":"\\ud83dx"}', "\ufffdx"),
        ('{"input":"\\ud83d\\n"}', "\ufffd\n"),
        ('{"input":"\\ude00"}', "\ufffd"),
        ('{"input":"cut \\u00', "cut "),
        ('{"input":"cut \\ud83d', "cut "),
        (r'{"input":"it\'s \d\\d \u00 é"}', "it\\'s \\d\\d \\u00 é"),
        (r'{"input":"\ud83d\x \ud83d\u0 \""}', '\ufffd\\x \ufffd\\u0 "'),
        ('{"other":"x"}', ""),
    ],
)
def test_a_custom_tool_s_text_however_it_is_cut(text: str, expected: str, size: int) -> None:
    reader = CustomInputReader()
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert "".join(map(reader.feed, pieces)) == expected


# ---- what is wrong --------------------------------------------------------------------------


def sending(*items: Any) -> dict[str, Any]:
    return {"input": list(items)}


def asking(fields: dict[str, Any]) -> dict[str, Any]:
    return {"input": "x", **fields}


def offering(*tools: dict[str, Any]) -> dict[str, Any]:
    return asking({"tools": list(tools)})


def choosing(choice: dict[str, Any]) -> dict[str, Any]:
    return asking({"tools": [NOW], "tool_choice": choice})


WRONG: dict[str, list[tuple[dict[str, Any], str]]] = {
    "missing_required_parameter": [
        ({}, "input"),
        (sending({"content": "x"}), "input[0].role"),
        (sending(USER, {"role": "user"}), "input[1].content"),
        (sending({**CALL, "call_id": None}), "input[0].call_id"),
        (sending({**CALL, "name": None}), "input[0].name"),
        (sending({**CALL, "arguments": None}), "input[0].arguments"),
        (sending(CALL, {**OUTPUT, "output": None}), "input[1].output"),
        (asking({"text": {"format": {"type": "json_schema"}}}), "text.format.schema"),
        (offering({"type": "function"}), "tools[0].name"),
        (offering({"type": "function", "function": {"name": "f"}}), "tools[0].name"),
        (choosing({"type": "function"}), "tool_choice.name"),
    ],
    "invalid_value": [
        ({"input": 5}, "input"),
        (sending(), "input"),
        ({"input": [], "instructions": "x"}, "input"),
        (sending("x"), "input[0]"),
        ({"input": [USER] * 16_385}, "input"),
        (sending({"role": "user", "content": [{}] * 65_537}), "input"),
        (sending({"role": "robot", "content": "x"}), "input[0].role"),
        (sending({"role": "user", "content": [{}]}), "input[0].content"),
        (sending({"role": "user", "content": [{"type": "input_text"}]}), "input[0].content"),
        (sending({**USER, "id": ""}), "input[0].id"),
        (sending({**said("assistant", "x"), "phase": "late"}), "input[0].phase"),
        (sending({**CALL, "call_id": ""}), "input[0].call_id"),
        (sending({**CALL, "arguments": "{"}), "input[0].arguments"),
        (sending({**CALL, "arguments": "[]"}), "input[0].arguments"),
        (sending(OUTPUT), "input[0].call_id"),
        (sending(CALL, {**OUTPUT, "type": "custom_tool_call_output"}), "input[1].call_id"),
        (
            sending({**THOUGHT, "content": None, "encrypted_content": "gAAAA"}),
            "input[0].encrypted_content",
        ),
        (
            sending({**THOUGHT, "content": None, "encrypted_content": encode_reasoning("x") + "!"}),
            "input[0].encrypted_content",
        ),
        (asking({"max_output_tokens": 0}), "max_output_tokens"),
        (asking({"max_tool_calls": 0}), "max_tool_calls"),
        (asking({"temperature": -1}), "temperature"),
        (asking({"top_logprobs": 2}), "top_logprobs"),
        (asking({"include": ["message.output_text.logprobs"], "top_logprobs": 21}), "top_logprobs"),
        (asking({"include": ["everything"]}), "include[0]"),
        (asking({"reasoning": {"effort": "huge"}}), "reasoning.effort"),
        (asking({"reasoning": {"summary": "long"}}), "reasoning.summary"),
        (asking({"text": {"verbosity": "none"}}), "text.verbosity"),
        (asking({"text": {"format": {"type": "xml"}}}), "text.format.type"),
        (
            asking({"text": {"format": {"type": "json_schema", "schema": "{"}}}),
            "text.format.schema",
        ),
        (
            asking(
                {"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}}
            ),
            "text.format",
        ),
        (asking({"metadata": {str(i): "x" for i in range(17)}}), "metadata"),
        (asking({"metadata": {"k" * 65: "x"}}), "metadata"),
        (asking({"metadata": {"k": "x" * 513}}), "metadata.k"),
        (asking({"metadata": {"k": 5}}), "metadata.k"),
        (asking({"stream_options": {}}), "stream_options"),
        (offering({**NOW, "name": "a b"}), "tools[0].name"),
        (offering(NOW, NOW), "tools[1].name"),
        (offering({**NOW, "parameters": {"type": "array"}}), "tools[0].parameters"),
        (asking({"tool_choice": "required"}), "tool_choice"),
        (asking({"tools": [NOW], "tool_choice": "always"}), "tool_choice"),
        (choosing({"type": "function", "name": "x"}), "tool_choice"),
        (choosing({"type": "custom", "name": "now"}), "tool_choice.name"),
        (choosing({"type": "allowed_tools", "mode": "auto"}), "tool_choice.tools"),
        (choosing({"type": "allowed_tools", "mode": "none", "tools": [NOW]}), "tool_choice.mode"),
    ],
    "unsupported_parameter": [
        (sending(said("user", "x", kind="input_image")), "input[0].content"),
        (sending(said("user", "x", kind="refusal")), "input[0].content"),
        (sending({"type": "web_search_call", "id": "ws_1"}), "input[0].type"),
        (sending({"type": "compaction", "encrypted_content": "x"}), "input[0].type"),
        (sending({"type": "item_reference", "id": "msg_1"}), "input"),
        (sending({"id": "msg_1"}), "input"),
        (sending(CALL, {**OUTPUT, "output": [{"type": "input_file"}]}), "input[1].output"),
        (asking({"store": True}), "store"),
        (asking({"previous_response_id": RESPONSE_ID}), "previous_response_id"),
        (asking({"reasoning": {"context": "all_turns"}}), "reasoning.context"),
        (
            asking({"stream": True, "stream_options": {"include_obfuscation": True}}),
            "stream_options.include_obfuscation",
        ),
        (offering({"type": "web_search"}), "tools[0].type"),
        (offering({**NOW, "defer_loading": True}), "tools[0].defer_loading"),
        (offering({**PATCH, "format": {"type": "grammar"}}), "tools[0].format"),
        (choosing({"type": "web_search"}), "tool_choice.type"),
    ],
    "model_not_found": [
        (asking({"model": "other"}), "model"),
    ],
    "context_length_exceeded": [
        (asking({"max_output_tokens": MAX_MODEL_LEN}), "max_output_tokens"),
        ({"input": "x" * 100_000}, "input"),
    ],
}
"""Bodies and the fields that are wrong, by the code of the error."""


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [(*row, code) for code, rows in WRONG.items() for row in rows],
    ids=lambda one: str(one)[:60],
)
def test_wrong_input_is_named(tools: Stack, body: dict[str, Any], param: str, code: str) -> None:
    answer = post(tools, PATH, **body)
    assert answer.status_code == (404 if code == "model_not_found" else 400), answer.text
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert error["type"] == "invalid_request_error"
    assert "messages" not in error["message"]
    assert not tools.engine.requests


@pytest.mark.parametrize("name", [*UNSUPPORTED, *RENAMED_FIELDS])
def test_fields_that_are_not_built_are_refused(stack: Stack, name: str) -> None:
    answer = post(stack, PATH, input="x", **{name: {"some": "value"}})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    assert post(stack, PATH, input="x", max_output_tokens=1, **{name: None}).status_code == 200
    assert len(stack.engine.requests) == 1


@pytest.mark.parametrize("name", [name for name, neutral in UNSUPPORTED.items() if neutral])
def test_neutral_values_are_accepted(stack: Stack, name: str) -> None:
    fields = {name: UNSUPPORTED[name][0]}
    assert post(stack, PATH, input="x", max_output_tokens=1, **fields).status_code == 200


def test_what_clients_send_without_effect_is_accepted(stack: Stack) -> None:
    codex = {
        "instructions": "You are a coding agent.",
        "input": [said("developer", "sandbox"), said("user", "hi")],
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "thread",
        "client_metadata": {"x": "y"},
        "text": {"verbosity": "medium"},
        "service_tier": "priority",
        "truncation": "disabled",
        "max_output_tokens": 1,
    }
    assert respond(stack, **codex)["service_tier"] == "default"


def test_messages_in_errors_are_called_input(stack: Stack) -> None:
    """Templates know roles and messages, clients know items."""
    template = "{{ raise_exception('no room for ' + messages[0].role) }}"
    with running_stack(tokenizer=tiny_tokenizer(template)) as refusing:
        error = post(refusing, PATH, input=[USER]).json()["error"]
    assert error["param"] == "input"
    assert error["message"] == "input do not fit the model's chat template: no room for user"
    error = post(stack, PATH, input=[USER, CALL, OUTPUT]).json()["error"]
    assert (error["param"], error["code"]) == ("input[1]", "unsupported_parameter")
    assert error["message"].startswith("input[1] is not supported: the model's chat template")
    paths = ("instructions", "input[4]")
    with (
        pytest.raises(UnsupportedParameterError, match=r"^input\[4\] is bad, not instructions$"),
        rename_error_fields(paths),
    ):
        raise UnsupportedParameterError("messages[1] is bad, not messages[0]", "messages[1]")
    with pytest.raises(RequestError, match="messages"), rename_error_fields(paths):
        raise RequestError("messages", "tools")


@pytest.mark.parametrize("digits", ["1", "9" * 5000])
def test_indices_in_a_client_s_text_are_kept(digits: str) -> None:
    """A template's error may contain a name that the client chose."""
    source = "{% for t in tools %}{% for n in t.names %}{{ t[n].type }}{% endfor %}{% endfor %}"
    with (
        pytest.raises(RequestError, match=rf"attribute '(messages|input)\[{digits}\]'") as caught,
        rename_error_fields(["input"]),
    ):
        ChatTemplate(source).render([USER], tools=[{"names": [f"messages[{digits}]"]}])
    assert caught.value.param == "input"
