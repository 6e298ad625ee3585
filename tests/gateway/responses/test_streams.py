"""Answers as items: the same whole and streamed, however their tokens come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gateway.core.tuning import GatewayTuning
from gateway.responses.items import encode_reasoning
from tests.gateway.fakes import BACKEND, saying, tiny_tokenizer
from tests.gateway.responses.streams import (
    PATH,
    both,
    check_order,
    parse,
    respond,
    stream,
    text_of,
    texts_of,
)
from tests.gateway.stack import Stack, post, running_stack
from tests.gateway.text.harmony.examples import PLAN_ARGUMENTS, SUM
from tests.gateway.text.harmony.test_codecs import ANSWER, TEMPLATE, WORDS
from tests.gateway.text.tool_formats.test_tools import ARGUMENTS, BOTH, CUT, FIRST, SCHEMA

pytestmark = pytest.mark.heavy

WEATHER = {"type": "function", "name": "weather", "parameters": SCHEMA}
NOW = {"type": "function", "name": "now"}
GENERATE = {"type": "function", "name": "generate_file"}
PATCH = {"type": "custom", "name": "patch", "description": "Takes a patch."}
LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
THOUGHTS = (
    "<|channel|>analysis<|message|>First.<|end|><|start|>assistant<|channel|>commentary<|message|>"
    "I look.<|end|><|start|>assistant<|channel|>analysis<|message|>Then.<|end|><|start|>assistant"
    "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}<|call|>"
)


@pytest.fixture(scope="module")
def shared_harmony() -> Iterator[Stack]:
    """A gateway whose model answers in the Harmony format."""
    with running_stack(tokenizer=tiny_tokenizer(TEMPLATE)) as stack:
        yield stack


@pytest.fixture
def harmony(shared_harmony: Stack) -> Iterator[Stack]:
    with shared_harmony.as_new():
        yield shared_harmony


def num_tokens(text: str) -> int:
    return len(BACKEND.encode(text).ids)


@pytest.mark.parametrize("width", [1, 3, 1000])
@pytest.mark.parametrize("fields", [{}, LOGPROBS, {"stop": ["lo;", "r w"]}, {"stop": "wor"}])
def test_a_stream_has_the_items_of_the_whole(
    stack: Stack, fields: dict[str, Any], width: int
) -> None:
    stack.engine.tokens_per_output = width
    found = both(stack, input="hello", seed=3, max_output_tokens=30, **fields)
    (message,) = found["output"]
    assert message["role"] == "assistant"
    assert "<|" not in text_of(message)
    logprobs = message["content"][0]["logprobs"]
    assert "".join(one["token"] for one in logprobs) == (text_of(message) if logprobs else "")
    assert bool(logprobs) is ("include" in fields)
    if "stop" in fields:
        assert (found["status"], message["status"]) == ("completed", "completed")


def test_the_limit_of_tokens_makes_it_incomplete(stack: Stack) -> None:
    found = both(stack, input="x", max_output_tokens=4, seed=1)
    assert found["status"] == "incomplete"
    assert found["incomplete_details"] == {"reason": "max_output_tokens"}
    assert found["completed_at"] is None
    assert found["output"][0]["status"] == "incomplete"
    assert found["usage"]["output_tokens"] == 4
    assert found["max_output_tokens"] == 4


def test_usage_has_the_cached_tokens(stack: Stack) -> None:
    stack.engine.script, stack.engine.num_cached_tokens = saying("hello"), 3
    usage = both(stack, input="hi there")["usage"]
    details = usage["input_tokens_details"]
    assert details == {"cached_tokens": 3, "cache_write_tokens": 0}
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


@pytest.mark.parametrize("said", ["", "\n \n"])
def test_an_empty_answer_is_an_empty_message(stack: Stack, said: str) -> None:
    stack.engine.script = saying(said)
    found = both(stack, input="x")
    assert texts_of(found) == [("message", said)]
    assert found["status"] == "completed"


@pytest.mark.parametrize("width", [1, 1000])
def test_characters_come_whole(stack: Stack, width: int) -> None:
    stack.engine.tokens_per_output = width
    text = "é世界👩‍👧 end"
    stack.engine.script = saying(text.encode())
    found = both(stack, input="x", **LOGPROBS)
    (message,) = found["output"]
    exact = bytes(b for one in message["content"][0]["logprobs"] for b in one["bytes"])
    assert exact.decode() == text == text_of(message)


def test_tokens_that_are_ready_together_share_an_event(stack: Stack) -> None:
    stack.engine.script, stack.engine.tokens_per_output = saying("hello world"), 1000
    kinds = [event["type"] for event in stream(stack, input="x", **LOGPROBS)]
    assert kinds.count("response.output_text.delta") == 1


# ---- calls ----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 5, 1000])
def test_words_and_calls(tools: Stack, width: int) -> None:
    tools.engine.script, tools.engine.tokens_per_output = saying(BOTH), width
    found = both(tools, input="x", tools=[WEATHER, NOW])
    assert texts_of(found) == [
        ("message", "On it.\n"),
        ("function_call", ARGUMENTS),
        ("function_call", "{}"),
    ]
    assert [item.get("name") for item in found["output"]] == [None, "weather", "now"]
    assert {item["status"] for item in found["output"]} == {"completed"}
    assert len({item["call_id"] for item in found["output"][1:]}) == 2
    assert found["tools"][0] == {**WEATHER, "description": None, "strict": False}
    assert found["tool_choice"] == "auto"


@pytest.mark.parametrize("width", [1, 1000])
def test_white_space_before_a_call_is_no_message(tools: Stack, width: int) -> None:
    tools.engine.script, tools.engine.tokens_per_output = saying(f"\n\n{FIRST}"), width
    found = both(tools, input="x", tools=[WEATHER], **LOGPROBS)
    assert texts_of(found) == [("function_call", ARGUMENTS)]
    tools.engine.script = saying("\n\nfine")
    found = both(tools, input="x", tools=[WEATHER], **LOGPROBS)
    assert texts_of(found) == [("message", "\n\nfine")]
    tokens = found["output"][0]["content"][0]["logprobs"]
    assert "".join(one["token"] for one in tokens) == "\n\nfine"


def test_a_cut_call_is_incomplete(tools: Stack) -> None:
    tools.engine.script = saying(CUT, end=False)
    found = both(tools, input="x", tools=[WEATHER], max_output_tokens=num_tokens(CUT))
    assert texts_of(found) == [("function_call", ARGUMENTS[:20])]
    assert (found["status"], found["output"][0]["status"]) == ("incomplete", "incomplete")
    tools.engine.script = saying(FIRST, end=False)
    found = both(tools, input="x", tools=[WEATHER], max_output_tokens=num_tokens(FIRST))
    assert (found["status"], found["output"][0]["status"]) == ("incomplete", "completed")


@pytest.mark.parametrize("width", [1, 4, 1000])
def test_a_custom_tool_gets_its_text(tools: Stack, width: int) -> None:
    text = 'a "b"\\n\n\t\u00e9 \\u0041 \U0001f600'
    call = '<tool_call>\n{"name": "patch", "arguments": {"input": "a \\"b\\"\\\\n\\n\\t\\u00e9 '
    call += '\\\\u0041 \\ud83d\\ude00"}}\n</tool_call>'
    tools.engine.script, tools.engine.tokens_per_output = saying(call), width
    found = both(tools, input="x", tools=[PATCH, WEATHER])
    assert texts_of(found) == [("custom_tool_call", text)]
    assert found["output"][0]["name"] == "patch"
    assert found["tools"][0] == {**PATCH, "format": {"type": "text"}}


# ---- reasoning ------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 7, 1000])
def test_reasoning_is_an_item(harmony: Stack, width: int) -> None:
    harmony.engine.script, harmony.engine.tokens_per_output = saying(SUM), width
    found = both(harmony, input="x", **LOGPROBS)
    reasoning, message = found["output"]
    assert (reasoning["type"], reasoning["summary"]) == ("reasoning", [])
    assert text_of(reasoning).startswith("User asks: ")
    assert reasoning["content"][0]["type"] == "reasoning_text"
    assert "encrypted_content" not in reasoning
    assert text_of(message) == "2 + 2 = 4."
    logprobs = message["content"][0]["logprobs"]
    assert "".join(one["token"] for one in logprobs) == "2 + 2 = 4."
    details = found["usage"]["output_tokens_details"]
    assert details == {"reasoning_tokens": num_tokens(text_of(reasoning))}


@pytest.mark.parametrize("width", [1, 7, 1000])
def test_items_keep_their_order(harmony: Stack, width: int) -> None:
    harmony.engine.script, harmony.engine.tokens_per_output = saying(THOUGHTS), width
    found = both(harmony, input="x", tools=[NOW])
    assert texts_of(found) == [
        ("reasoning", "First."),
        ("message", "I look."),
        ("reasoning", "Then."),
        ("function_call", "{}"),
    ]
    details = found["usage"]["output_tokens_details"]
    assert details == {"reasoning_tokens": num_tokens("First.") + num_tokens("Then.")}


def test_calls_of_the_format(harmony: Stack) -> None:
    harmony.engine.script = saying(ANSWER)
    found = both(harmony, input="x", tools=[GENERATE])
    assert texts_of(found) == [
        ("reasoning", "{long chain of thought}"),
        ("message", WORDS),
        ("function_call", PLAN_ARGUMENTS),
    ]


def test_reasoning_that_goes_back(harmony: Stack) -> None:
    harmony.engine.script = saying(SUM)
    asked = {"input": "x", "include": ["reasoning.encrypted_content"]}
    (reasoning, _) = both(harmony, **asked)["output"]
    assert reasoning["encrypted_content"] == encode_reasoning(text_of(reasoning))


# ---- errors and silence ---------------------------------------------------------------------


def test_an_error_after_the_first_byte_is_two_events(stack: Stack) -> None:
    stack.engine.step_s = 0.01
    fields = {"input": "x", "max_output_tokens": 400, "stream": True}
    with stack.http.stream("POST", PATH, json=fields) as answer:
        text = ""
        for piece in answer.iter_text():
            text += piece
            if "output_text.delta" in text:
                stack.engine.error = ("logits of the request are not finite", "nan_logits")
    events = parse(text)
    error, failed = events[-2:]
    reason = "logits of the request are not finite"
    assert (error["type"], error["message"], error["code"]) == ("error", reason, "internal_error")
    assert error["error"]["message"] == reason  # by which openai-python raises
    assert failed["type"] == "response.failed"
    response = failed["response"]
    assert (response["status"], response["store"]) == ("failed", False)
    assert response["error"] == {"code": "server_error", "message": reason}
    assert response["output"][0]["status"] == "incomplete"
    assert text_of(response["output"][0])


def test_an_error_before_the_first_byte_has_a_status(stack: Stack) -> None:
    stack.engine.error = ("no room", "queue_full")
    answer = post(stack, PATH, input="x", stream=True)
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "queue_full"


def test_a_comment_is_sent_in_silence() -> None:
    fields = {"input": "x", "max_output_tokens": 2, "stream": True}
    text = ""
    with running_stack(tuning=GatewayTuning(ping_after_s=0.05)) as stack:
        stack.engine.is_paused = True
        with stack.http.stream("POST", PATH, json=fields) as answer:
            for piece in answer.iter_text():
                text += piece
                stack.engine.is_paused = "ping" not in text
    assert text.startswith("event: response.created\n")
    assert "\n\n: ping\n\n" in text
    check_order(parse(text))


def test_a_client_that_leaves_ends_the_request(stack: Stack) -> None:
    stack.engine.step_s = 0.01
    fields = {"input": "x", "stream": True}
    with stack.http.stream("POST", PATH, json=fields) as answer:
        next(answer.iter_text())
    stack.wait_for(lambda: bool(stack.engine.aborts), "the abort")
    stack.wait_no_requests()


def test_the_model_and_the_request_are_named(stack: Stack) -> None:
    asked: dict[str, Any] = {
        "input": "x",
        "instructions": "be brief",
        "max_output_tokens": 2,
        "max_tool_calls": 3,
        "metadata": {"team": "a"},
        "parallel_tool_calls": False,
        "prompt_cache_key": "k",
        "reasoning": {"effort": "low", "summary": "auto"},
        "safety_identifier": "s",
        "text": {"verbosity": "low"},
        "temperature": 0.5,
        "top_p": 0.25,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "user": "u",
    }
    found = respond(stack, **asked)
    del asked["input"]
    text = asked.pop("text")
    assert {name: found[name] for name in asked} == asked
    assert found["text"] == {"format": {"type": "text"}, **text}
    assert (found["model"], found["object"], found["store"]) == ("tiny", "response", False)
    assert found["service_tier"] == "default"
