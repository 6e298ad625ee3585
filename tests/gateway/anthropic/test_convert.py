"""Bodies of Anthropic's Messages as calls: conversations, tools, reasoning, structured output."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.core.errors import RequestError, UnsupportedParameterError
from gateway.anthropic.convert import chat_input, message_call
from gateway.anthropic.schema import CountTokensBody, MessagesBody
from gateway.anthropic.unsupported import check_unsupported
from gateway.core.call import GenerateCall
from gateway.http.parse import parse_body

USER = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"name": "weather", "description": "Looks.", "input_schema": SCHEMA}
CACHED = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}


def convert(**fields: Any) -> GenerateCall:
    """The call of a body with one message, unless it is given."""
    body = {"model": "m", "max_tokens": 2048, "messages": [USER], **fields}
    check_unsupported(body)
    return message_call(parse_body(MessagesBody, body))


def messages_of(*messages: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    """What the chat template sees."""
    chat = convert(messages=list(messages), **fields).chat
    assert chat is not None
    return [dict(message) for message in chat.messages]


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value, **CACHED}


def use(name: str, **given: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{name}", "name": name, "input": given}


def result(name: str, content: Any = None, **more: Any) -> dict[str, Any]:
    given = {} if content is None else {"content": content}
    return {"type": "tool_result", "tool_use_id": f"toolu_{name}", **given, **more}


def assistant(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


# ---- conversations --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "shown"),
    [
        ("Be brief.", "Be brief."),
        ([text("Be brief."), text("Be kind.")], "Be brief.\nBe kind."),
        ([text("x-anthropic-billing-header: cc_version=2; cch=a1b2;"), text("Be")], "Be"),
        ("", None),
        ([], None),
        (None, None),
    ],
)
def test_the_system_prompt_is_the_first_message(system: Any, shown: str | None) -> None:
    found = messages_of(USER, system=system)
    expected = [] if shown is None else [{"role": "system", "content": shown}]
    assert found == [*expected, USER]


def test_results_are_messages_of_their_own() -> None:
    found = messages_of(
        USER,
        assistant(text("Let me look."), use("weather", city="Ems"), use("now")),
        user(
            result("weather", "rain"),
            result("now", [text("12"), text("30")], is_error=False),
            text("And?"),
        ),
        assistant(use("now")),
        user(result("now", "no clock", is_error=True), result("now")),
    )
    assert [message["role"] for message in found] == [
        *("user", "assistant", "tool", "tool", "user", "assistant", "tool", "tool")
    ]
    first = found[1]
    assert first["content"] == "Let me look."
    assert [call["id"] for call in first["tool_calls"]] == ["toolu_weather", "toolu_now"]
    function = first["tool_calls"][0]["function"]
    assert (function["name"], function["arguments"]) == ("weather", {"city": "Ems"})
    assert json.loads(function["arguments"].text) == {"city": "Ems"}
    assert [m["content"] for m in found[2:5]] == ["rain", "12\n30", "And?"]
    assert [m.get("tool_call_id") for m in found[2:5]] == ["toolu_weather", "toolu_now", None]
    assert found[5]["content"] == ""
    assert [m["content"] for m in found[6:]] == ["Error: no clock", ""]


def test_reasoning_of_earlier_turns_goes_to_the_template() -> None:
    said = {"type": "thinking", "thinking": "Hm.", "signature": "anything"}
    hidden = {"type": "redacted_thinking", "data": "opaque"}
    empty = {"type": "thinking", "thinking": "", "signature": "x"}
    found = messages_of(USER, assistant(said, hidden, empty, text("Yes.")), USER)
    assert found[1] == {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
    assert "reasoning_content" not in messages_of(USER, assistant(hidden, text("a")), USER)[1]


def test_neighbours_of_one_role_are_one_turn() -> None:
    found = messages_of(
        USER, user(text("a"), text("b")), assistant(text("c")), assistant(text("d"))
    )
    assert [m["content"] for m in found] == ["hi\na\nb", "c\nd"]
    calls = messages_of(USER, assistant(use("a")), assistant(use("b")), user(result("a")))
    assert [call["id"] for call in calls[1]["tool_calls"]] == ["toolu_a", "toolu_b"]


def test_instructions_may_come_later() -> None:
    later = {"type": "mid_conv_system", "content": [text("Be brief.")]}
    found = messages_of(USER, user(later, text("a")), {"role": "system", "content": "Be kind."})
    assert [(m["role"], m["content"]) for m in found[1:]] == [
        ("system", "Be brief."),
        ("user", "a"),
        ("system", "Be kind."),
    ]


def test_a_last_message_of_the_assistant_is_continued() -> None:
    chat = convert(messages=[USER, assistant(text("It is"))]).chat
    assert chat is not None
    assert (chat.continue_final_message, chat.add_generation_prompt) == (True, False)
    other = convert().chat
    assert other is not None
    assert (other.continue_final_message, other.add_generation_prompt) == (False, True)


@pytest.mark.parametrize(
    ("message", "param", "is_unbuilt"),
    [
        (user({"type": "image", "source": {}}), "messages[1].content[0].type", True),
        (user(text("a"), {"type": "document"}), "messages[1].content[1].type", True),
        (user({"type": "search_result"}), "messages[1].content[0].type", True),
        (assistant({"type": "server_tool_use"}), "messages[1].content[0].type", True),
        (user(use("a")), "messages[1].content[0].type", False),
        (assistant(result("a")), "messages[1].content[0].type", False),
        (
            user(result("a", [text("x"), {"type": "image"}])),
            "messages[1].content[0].content[1].type",
            True,
        ),
        (user({"type": "text"}), "messages[1].content[0].text", False),
        (user({"type": "tool_result"}), "messages[1].content[0].tool_use_id", False),
        (assistant({"type": "tool_use", "name": "a"}), "messages[1].content[0].id", False),
        (
            assistant({**use("a"), "input": {"x": float("nan")}}),
            "messages[1].content[0].input",
            False,
        ),
        ({"role": "system", "content": [{"type": "image"}]}, "messages[1].content[0].type", True),
        (assistant(use("a")), "messages", False),
        (assistant(text("")), "messages", False),
        ({"role": "tool", "content": "x"}, "messages[1].role", False),
        ({"role": "user", "content": 5}, "messages[1].content", False),
        (
            {"role": "user", "content": [{"type": "text", "text": 5}]},
            "messages[1].content[0].text",
            False,
        ),
        ({"role": "user"}, "messages[1].content", False),
    ],
)
def test_what_a_message_cannot_hold_is_named(
    message: dict[str, Any], param: str, is_unbuilt: bool
) -> None:
    with pytest.raises(RequestError) as caught:
        messages_of(USER, message)
    assert caught.value.param == param
    assert isinstance(caught.value, UnsupportedParameterError) is is_unbuilt
    assert param in str(caught.value)
    is_missing = caught.value.code == "missing_required_parameter"
    assert is_missing is str(caught.value).endswith("is required")


# ---- tools ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "must_call", "only", "is_parallel"),
    [
        (None, False, None, True),
        ({"type": "auto"}, False, None, True),
        ({"type": "auto", "disable_parallel_tool_use": True}, False, None, False),
        ({"type": "any"}, True, None, True),
        ({"type": "any", "disable_parallel_tool_use": True}, True, None, False),
        ({"type": "tool", "name": "weather"}, True, "weather", True),
    ],
)
def test_tools_and_their_choice(
    choice: dict[str, Any] | None, must_call: bool, only: str | None, is_parallel: bool
) -> None:
    found = convert(tools=[{**TOOL, **CACHED, "type": "custom"}], tool_choice=choice).tools
    assert found is not None
    assert (found.must_call, found.is_parallel) == (must_call, is_parallel)
    assert found.only == ((only,) if only else ())
    (tool,) = found.tools
    assert (tool.name, tool.description, tool.parameters) == ("weather", "Looks.", SCHEMA)
    assert not tool.is_strict


def test_what_hides_tools_and_what_makes_them_strict() -> None:
    assert convert(tools=[TOOL], tool_choice={"type": "none"}).tools is None
    assert convert(tools=[]).tools is None
    strict = convert(tools=[{**TOOL, "strict": True}]).tools
    assert strict is not None
    assert strict.tools[0].is_strict


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"tools": [{**TOOL, "input_examples": [{}]}]}, "tools[0].input_examples"),
        (
            {"tools": [{**TOOL, "allowed_callers": ["code_execution_20250825"]}]},
            "tools[0].allowed_callers",
        ),
        ({"tools": [{"name": "weather"}]}, "tools[0].input_schema"),
        ({"tools": [{**TOOL, "name": "a b"}]}, "tools[0].name"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name"),
        ({"tools": [{**TOOL, "input_schema": {"type": "string"}}]}, "tools[0].input_schema"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "x"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ],
)
def test_wrong_tools_are_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        convert(**fields)
    assert caught.value.param == param


def test_names_of_tools_may_be_long() -> None:
    """Names of functions of other servers begin with those of the servers."""
    found = convert(tools=[{**TOOL, "name": "mcp__" + "x" * 123}]).tools
    assert found is not None
    assert len(found.tools[0].name) == 128


# ---- other fields ---------------------------------------------------------------------------


def test_fields_of_sampling() -> None:
    fields = convert(stop_sequences=["a", "b"], temperature=0.5, top_p=0.9, top_k=5)
    assert (fields.model, fields.max_tokens, fields.stop) == ("m", 2048, ("a", "b"))
    assert (fields.temperature, fields.top_p, fields.top_k) == (0.5, 0.9, 5)
    assert (fields.stop_name, fields.fits_context) == ("stop_sequences", True)


@pytest.mark.parametrize(
    ("thinking", "is_on"),
    [
        (None, False),
        ({"type": "disabled"}, False),
        ({"type": "adaptive"}, True),
        ({"type": "enabled", "budget_tokens": 1024}, True),
        ({"type": "enabled", "budget_tokens": 2047, "display": "omitted"}, True),
    ],
)
def test_thinking_is_a_variable_of_the_template(
    thinking: dict[str, Any] | None, is_on: bool
) -> None:
    chat = convert(thinking=thinking).chat
    assert chat is not None
    assert chat.template_kwargs == {"enable_thinking": is_on, "thinking": is_on}
    own = convert(thinking=thinking, chat_template_kwargs={"thinking": 1, "x": 2}).chat
    assert own is not None
    assert own.template_kwargs == {"enable_thinking": is_on, "thinking": 1, "x": 2}


@pytest.mark.parametrize(
    ("thinking", "param"),
    [
        ({"type": "enabled"}, "thinking.budget_tokens"),
        ({"type": "enabled", "budget_tokens": 1023}, "thinking.budget_tokens"),
        ({"type": "enabled", "budget_tokens": 2048}, "thinking.budget_tokens"),
        ({"type": "on"}, "thinking.type"),
        ({"type": "between_tools"}, "thinking.type"),
        ({"type": "adaptive", "display": "all"}, "thinking.display"),
    ],
)
def test_wrong_thinking_is_named(thinking: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        convert(thinking=thinking)
    assert caught.value.param == param


@pytest.mark.parametrize(("effort", "told"), [("low", "low"), ("max", "xhigh"), (None, None)])
def test_effort(effort: str | None, told: str | None) -> None:
    chat = convert(output_config={"effort": effort}).chat
    assert chat is not None
    assert chat.reasoning_effort == told


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        (
            {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
            "output_config.format.schema",
        ),
        ({"output_format": {"type": "json_schema", "schema": SCHEMA}}, "output_format.schema"),
    ],
)
def test_structured_output(fields: dict[str, Any], field: str) -> None:
    call = convert(**fields)
    assert call.grammar is not None
    assert call.grammar.field == field
    assert json.loads(call.grammar.text) == SCHEMA
    assert call.chat is not None
    assert call.chat.output_schema is not None
    assert json.loads(call.chat.output_schema.schema) == SCHEMA


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"model": None}, "model"),
        ({"messages": None}, "messages"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"speed": "fast"}, "speed"),
        (
            {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
            "context_management.edits[0].type",
        ),
        (
            {"context_management": {"edits": [5, {"type": "compact"}]}},
            "context_management.edits[1].type",
        ),
        ({"output_config": {"effort": "least"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        (
            {"output_config": {"format": {"type": "json_object", "schema": {}}}},
            "output_config.format.type",
        ),
        (
            {
                "output_config": {"format": {"type": "json_schema", "schema": {}}},
                "output_format": {"type": "json_schema", "schema": {}},
            },
            "output_format",
        ),
        ({"system": 5}, "system"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        (
            {"system": [text("x-anthropic-billing-header: a"), {"type": "image"}]},
            "system[1].type",
        ),
        ({"stop_sequences": "a"}, "stop_sequences"),
        ({"temperature": "1"}, "temperature"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        convert(**fields)
    assert caught.value.param == param


def test_fields_without_an_effect() -> None:
    plain = convert()
    given = convert(
        metadata={"user_id": "u"},
        service_tier="standard_only",
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        speed="standard",
        container=None,
        mcp_servers=[],
        diagnostics={"previous_message_id": None},
        unknown=1,
    )
    assert given == plain


def test_tokens_are_counted_of_the_same_conversation() -> None:
    given = {"messages": [USER], "system": "Be", "tools": [TOOL], "thinking": {"type": "adaptive"}}
    chat = convert(**given).chat
    assert chat_input(parse_body(CountTokensBody, {"model": "m", **given})) == chat
