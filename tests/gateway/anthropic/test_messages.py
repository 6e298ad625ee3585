"""``/v1/messages`` and ``/v1/messages/count_tokens`` as clients see them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from cluster.config.gateway import GatewaySection
from gateway.anthropic.blocks import collect_blocks
from gateway.core.tool_use import ToolCallFormat
from gateway.core.tuning import GatewayTuning
from tests.gateway.fakes import MAX_MODEL_LEN, saying, tiny_tokenizer
from tests.gateway.http.test_thinking import TEMPLATE
from tests.gateway.stack import MODEL, WAIT_S, Stack, post, running_stack
from tests.gateway.text.tool_formats.examples import written

PATH = "/v1/messages"
USER = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = [{"name": "weather", "input_schema": SCHEMA}, {"name": "now", "input_schema": {}}]
ON = {"type": "adaptive"}
CALLS = written(ToolCallFormat.GLM, [("weather", {"city": 'Bad "Ems"', "days": 3}), ("now", {})])


@pytest.fixture(scope="module")
def messages_stack() -> Iterator[Stack]:
    """A gateway whose model reasons and calls functions."""
    with running_stack(tokenizer=tiny_tokenizer(TEMPLATE)) as stack:
        yield stack


@dataclass
class Read:
    """An answer, whole or streamed."""

    message: dict[str, Any]
    events: list[dict[str, Any]]


def ask(stack: Stack, **fields: Any) -> dict[str, Any]:
    """The message, which its stream must equal."""
    body = {"model": MODEL, "max_tokens": 200, "messages": USER, **fields}
    response = post(stack, PATH, **body)
    assert response.status_code == 200, response.text
    whole: dict[str, Any] = response.json()
    streamed = stream(stack, **body).message
    assert _without_ids(streamed) == _without_ids(whole)
    return whole


def _without_ids(message: dict[str, Any]) -> dict[str, Any]:
    """A message without the names that are drawn."""
    content = [{k: v for k, v in block.items() if k != "id"} for block in message["content"]]
    return {**message, "id": "", "content": content}


def stream(stack: Stack, **fields: Any) -> Read:
    """An answer from its events, which must follow the protocol's order."""
    with stack.http.stream("POST", PATH, json={**fields, "stream": True}) as response:
        response.read()
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = events_of(response.text)
    kinds = [event["type"] for event in events if event["type"] != "ping"]
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
    return Read(put_together(copy.deepcopy(events)), events)


def events_of(text: str) -> list[dict[str, Any]]:
    """The data of each event, whose name must be its type."""
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    found = []
    for block in blocks:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def put_together(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that events make, as Anthropic's clients do it."""
    message: dict[str, Any] = {}
    inputs: dict[int, str] = {}
    is_open = False
    for event in events:
        match event["type"]:
            case "message_start":
                message = event["message"]
                assert message["content"] == []
                assert message["stop_reason"] is None
            case "content_block_start":
                assert not is_open
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"])
                is_open = True
            case "content_block_delta":
                assert event["index"] == len(message["content"]) - 1
                (kind, text), *_ = [pair for pair in event["delta"].items() if pair[0] != "type"]
                if kind == "partial_json":
                    inputs[event["index"]] = inputs.get(event["index"], "") + text
                else:
                    message["content"][-1][kind] += text
            case "content_block_stop":
                assert is_open
                is_open = False
            case "message_delta":
                message |= event["delta"]
                message["usage"] |= event["usage"]
    assert not is_open
    for place, text in inputs.items():
        try:
            message["content"][place]["input"] = json.loads(text)
        except ValueError:
            message["content"][place]["input"] = {}
    return message


# ---- answers --------------------------------------------------------------------------------


def test_a_message(messages_stack: Stack) -> None:
    messages_stack.engine.script = saying("hello there")
    message = ask(messages_stack, temperature=0.0)
    assert message.pop("id").startswith("msg_")
    prompt = post(messages_stack, "/tokenize", messages=USER, **variables(False)).json()["count"]
    tokens = len(tiny_tokenizer().encode("hello there")) + 1
    assert message == {
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [{"type": "text", "text": "hello there"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": prompt,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": tokens,
            "service_tier": "standard",
        },
    }
    request = messages_stack.engine.requests[-1]
    assert (request.params.temperature, request.params.max_tokens) == (0.0, 200)


def variables(is_on: bool) -> dict[str, Any]:
    return {"chat_template_kwargs": {"enable_thinking": is_on}}


def test_events_are_named_and_complete(messages_stack: Stack) -> None:
    messages_stack.engine.script = saying("hi")
    read = stream(messages_stack, model=MODEL, max_tokens=9, messages=USER)
    kinds = [event["type"] for event in read.events]
    text = [kind for kind in kinds if kind == "content_block_delta"]
    assert text
    assert kinds == [
        *("message_start", "content_block_start", *text),
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    assert read.events[1]["content_block"] == {"type": "text", "text": ""}
    assert read.events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert read.events[-2]["usage"]["output_tokens"] == 3
    assert read.events[-1] == {"type": "message_stop"}


def test_calls_are_blocks_of_their_own(messages_stack: Stack) -> None:
    messages_stack.engine.script = saying(f"On it.\n{CALLS}")
    message = ask(messages_stack, tools=TOOLS)
    said, first, second = message["content"]
    assert said == {"type": "text", "text": "On it.\n"}
    assert first.pop("id").startswith("toolu_")
    assert first == {
        "type": "tool_use",
        "name": "weather",
        "input": {"city": 'Bad "Ems"', "days": 3},
    }
    assert (second["name"], second["input"]) == ("now", {})
    assert message["stop_reason"] == "tool_use"


def test_arguments_that_json_cannot_have_are_replaced() -> None:
    """The response could not be encoded: JSON has no infinity, and UTF-8 no surrogates."""
    block = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}}
    written = r'{"a": 1e999, "b": NaN, "c": 2.5, "\ud800": "\udfff"}'
    delta = {"type": "input_json_delta", "partial_json": written}
    events = [
        {"type": "content_block_start", "index": 0, "content_block": block},
        {"type": "content_block_delta", "index": 0, "delta": delta},
    ]
    (found,) = collect_blocks(events)
    assert found["input"] == {"a": "1e999", "b": "NaN", "c": 2.5, "\ufffd": "\ufffd"}


def test_white_space_alone_is_no_block(messages_stack: Stack) -> None:
    messages_stack.engine.script = saying(f"\n\n{CALLS}")
    message = ask(messages_stack, tools=TOOLS)
    assert [block["type"] for block in message["content"]] == ["tool_use", "tool_use"]
    messages_stack.engine.script = saying("\n a\n")
    assert ask(messages_stack)["content"] == [{"type": "text", "text": "\n a\n"}]
    messages_stack.engine.script = saying("\n ")
    assert ask(messages_stack)["content"] == []


def test_a_cut_call_has_no_input(messages_stack: Stack) -> None:
    text = CALLS[: CALLS.index("Bad") + 2]
    messages_stack.engine.script = saying(text, end=False)
    num_tokens = len(tiny_tokenizer().encode(text))
    message = ask(messages_stack, tools=TOOLS, max_tokens=num_tokens)
    (block,) = message["content"]
    assert (block["name"], block["input"]) == ("weather", {})
    assert message["stop_reason"] == "max_tokens"


@pytest.mark.parametrize(
    ("thinking", "kinds"),
    [
        (ON, ["thinking", "text"]),
        ({"type": "enabled", "budget_tokens": 1024}, ["thinking", "text"]),
        ({**ON, "display": "omitted"}, ["thinking", "text"]),
        ({"type": "disabled"}, ["text"]),
        (None, ["text"]),
    ],
)
def test_reasoning_is_shown_to_who_asks_for_it(
    messages_stack: Stack, thinking: dict[str, Any] | None, kinds: list[str]
) -> None:
    is_on = thinking is not None and thinking["type"] != "disabled"
    messages_stack.engine.script = saying("Hm,\nwell.</think>\n\nYes." if is_on else "Yes.")
    message = ask(messages_stack, thinking=thinking, max_tokens=2000)
    assert [block["type"] for block in message["content"]] == kinds
    assert message["content"][-1]["text"] == "Yes."
    if is_on and thinking is not None:
        first = message["content"][0]
        assert first["thinking"] == ("" if "display" in thinking else "Hm,\nwell.")
        assert len(first["signature"]) == 64
    prompt = tiny_tokenizer().decode(messages_stack.engine.requests[-1].prompt, False)
    assert prompt.endswith("<think>\n" if is_on else "<think>\n\n</think>\n\n")


def test_reasoning_that_nobody_asked_for_is_left_out(messages_stack: Stack) -> None:
    """Clients that did not ask for it read the first block as text."""
    messages_stack.engine.script = saying("Hm.</think>Yes.")
    kwargs = {"enable_thinking": True}
    message = ask(messages_stack, chat_template_kwargs=kwargs)
    assert message["content"] == [{"type": "text", "text": "Yes."}]


@pytest.mark.parametrize(
    ("said", "fields", "reason", "sequence"),
    [
        ("a b stop c", {"stop_sequences": ["stop", "x"]}, "stop_sequence", "stop"),
        ("a b c", {"max_tokens": 2}, "max_tokens", None),
        ("a b c", {}, "end_turn", None),
    ],
)
def test_stop_reasons(
    messages_stack: Stack, said: str, fields: dict[str, Any], reason: str, sequence: str | None
) -> None:
    messages_stack.engine.script = saying(said)
    message = ask(messages_stack, **fields)
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, sequence)


def test_max_tokens_may_exceed_the_context(messages_stack: Stack) -> None:
    messages_stack.engine.script = saying("a" * 3000, end=False)
    message = ask(messages_stack, max_tokens=32_000)
    usage = message["usage"]
    assert message["stop_reason"] == "model_context_window_exceeded"
    assert usage["input_tokens"] + usage["output_tokens"] == MAX_MODEL_LEN


def test_cached_tokens_are_counted_apart(messages_stack: Stack) -> None:
    messages_stack.engine.script = saying("hi")
    before = ask(messages_stack)["usage"]
    messages_stack.engine.num_cached_tokens = 8
    try:
        usage = ask(messages_stack)["usage"]
        read = stream(messages_stack, model=MODEL, max_tokens=9, messages=USER)
    finally:
        messages_stack.engine.num_cached_tokens = 0
    assert usage["cache_read_input_tokens"] == 8
    assert usage["input_tokens"] == before["input_tokens"] - 8
    assert read.events[0]["message"]["usage"]["cache_read_input_tokens"] == 8


def test_structured_output_and_forced_calls_have_grammars(messages_stack: Stack) -> None:
    engine = messages_stack.engine
    engine.script = saying("3")
    wanted = {"format": {"type": "json_schema", "schema": {"type": "integer"}}}
    ask(messages_stack, output_config=wanted)
    grammar = engine.requests[-1].params.grammar
    assert grammar is not None
    assert grammar.field == "output_config.format.schema"
    engine.script = saying(CALLS)
    ask(messages_stack, tools=TOOLS, tool_choice={"type": "any"})
    grammar = engine.requests[-1].params.grammar
    assert grammar is not None
    assert "TEXT |" not in grammar.text
    ask(messages_stack, tools=TOOLS, tool_choice={"type": "none"})
    assert engine.requests[-1].params.grammar is None


def test_a_conversation_goes_on(messages_stack: Stack) -> None:
    messages_stack.engine.script = saying("fine")
    call = {"type": "tool_use", "id": "toolu_1", "name": "now", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "noon"}
    thought = {"type": "thinking", "thinking": "Hm.", "signature": ""}
    turns = [
        {"role": "assistant", "content": [thought, call]},
        {"role": "user", "content": [result]},
        {"role": "assistant", "content": "It is"},
    ]
    ask(messages_stack, messages=[*USER, *turns], system="Be brief.", tools=TOOLS)
    prompt = tiny_tokenizer().decode(messages_stack.engine.requests[-1].prompt, False)
    assert "<|system|>Be brief." in prompt
    assert "<think>Hm.</think>" in prompt
    assert "<|tool|>noon" in prompt
    assert prompt.endswith("<|assistant|>It is")


def test_tokens_are_counted(messages_stack: Stack) -> None:
    messages_stack.engine.script = saying("hi")
    given = {"model": MODEL, "messages": USER, "system": "Be", "tools": TOOLS, "thinking": ON}
    response = post(messages_stack, f"{PATH}/count_tokens", **given)
    assert response.status_code == 200, response.text
    usage = ask(messages_stack, **given)["usage"]
    assert response.json() == {"input_tokens": usage["input_tokens"]}


# ---- errors ---------------------------------------------------------------------------------


def check_error(response: httpx.Response, status: int, kind: str) -> str:
    """The message of an error in Anthropic's form."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"type", "error", "request_id"}
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert body["request_id"] == response.headers["x-request-id"] == response.headers["request-id"]
    return str(body["error"]["message"])


def test_errors_before_the_route(messages_stack: Stack) -> None:
    http = messages_stack.http
    for path in (PATH, f"{PATH}/count_tokens"):
        check_error(http.get(path), 405, "invalid_request_error")
        message = check_error(http.post(path, content=b"{"), 400, "invalid_request_error")
        assert "not valid JSON" in message
        plain = {"content-type": "text/plain"}
        check_error(http.post(path, content=b"{}", headers=plain), 400, "invalid_request_error")
        large = b" " * (messages_stack.gateway.limits.max_body_bytes + 1)
        check_error(http.post(path, content=large), 413, "request_too_large")
    check_error(http.post(f"{PATH}/batches", json={}), 404, "not_found_error")
    openai = http.post("/v1/messagesx", json={}).json()
    assert set(openai) == {"error"}


@pytest.mark.parametrize(
    ("fields", "status", "kind", "text"),
    [
        ({"model": "claude-x"}, 404, "not_found_error", "the model 'claude-x' does not exist"),
        ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens (0) must be at least 1"),
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens must be"),
        ({"stop_sequences": ["x"] * 17}, 400, "invalid_request_error", "stop_sequences has 17"),
        ({"temperature": -1.0}, 400, "invalid_request_error", "temperature (-1.0) must be"),
        (
            {"messages": [{"role": "user", "content": "x" * 600}]},
            400,
            "invalid_request_error",
            "prompt is too long: ",
        ),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            400,
            "invalid_request_error",
            "tools[0].type 'web_search_20250305' is not supported",
        ),
        ({"thinking": {"type": "on"}}, 400, "invalid_request_error", "thinking.type must be"),
    ],
)
def test_errors_of_fields(
    messages_stack: Stack, fields: dict[str, Any], status: int, kind: str, text: str
) -> None:
    body = {"model": MODEL, "max_tokens": 9, "messages": USER, **fields}
    for more in ({}, {"stream": True}):
        response = post(messages_stack, PATH, **body, **more)
        assert check_error(response, status, kind).startswith(text)


def test_the_version_must_be_known(messages_stack: Stack) -> None:
    messages_stack.engine.script = saying("hi")
    body = {"model": MODEL, "max_tokens": 9, "messages": USER}
    for version in ("2023-06-01", "2026-10-21"):
        known = {"anthropic-version": version, "anthropic-beta": "a-2025-01-01,b-2025-02-02"}
        assert messages_stack.http.post(PATH, json=body, headers=known).status_code == 200
    for version in ("2023-01-01", "latest", ""):
        wrong = {"anthropic-version": version}
        response = messages_stack.http.post(PATH, json=body, headers=wrong)
        message = check_error(response, 400, "invalid_request_error")
        assert message == f"anthropic-version ({version!r}) must be a date from 2023-06-01 on"


def test_errors_within_a_stream_are_events(messages_stack: Stack) -> None:
    engine = messages_stack.engine
    engine.script, engine.pause_after = saying("hello world"), 1
    url = f"{messages_stack.url}{PATH}"
    body = {"model": MODEL, "max_tokens": 9, "messages": USER, "stream": True}
    with httpx.stream("POST", url, json=body, timeout=WAIT_S) as response:
        pieces = response.iter_text()
        text = next(pieces)
        engine.error = ("out of luck", "internal_error")
        engine.pause_after = None
        text += "".join(pieces)
    engine.error = None
    last = events_of(text)[-1]
    assert last["type"] == "error"
    assert last["error"] == {"type": "api_error", "message": "out of luck"}
    assert last["request_id"] == response.headers["request-id"]


def test_silence_is_broken_by_pings() -> None:
    tuning = GatewayTuning(ping_after_s=0.05)
    with running_stack(tokenizer=tiny_tokenizer(TEMPLATE), tuning=tuning) as stack:
        stack.engine.script = saying("hi")
        stack.engine.is_paused = True
        url, body = f"{stack.url}{PATH}", {"model": MODEL, "max_tokens": 9, "messages": USER}
        with httpx.stream("POST", url, json={**body, "stream": True}, timeout=WAIT_S) as response:
            pieces = response.iter_text()
            text = next(pieces)
            stack.engine.is_paused = False
            text += "".join(pieces)
    kinds = [event["type"] for event in events_of(text)]
    assert kinds[:2] == ["message_start", "ping"]
    assert kinds.count("message_start") == 1
    assert kinds[-1] == "message_stop"


# ---- keys -----------------------------------------------------------------------------------


def test_keys_come_in_either_header() -> None:
    section = GatewaySection(request_timeout_s=WAIT_S, api_keys=("secret-key-1",))
    body = {"model": MODEL, "max_tokens": 9, "messages": USER}
    with running_stack(section, tiny_tokenizer(TEMPLATE)) as stack:
        stack.engine.script = saying("hi")
        for headers in ({"x-api-key": "secret-key-1"}, {"authorization": "Bearer secret-key-1"}):
            assert stack.http.post(PATH, json=body, headers=headers).status_code == 200
            assert stack.http.get("/v1/models", headers=headers).status_code == 200
        for wrong in ({}, {"x-api-key": "other"}):
            response = stack.http.post(PATH, json=body, headers=wrong)
            check_error(response, 401, "authentication_error")
        assert "error" in stack.http.get("/v1/models", headers={"x-api-key": "other"}).json()
