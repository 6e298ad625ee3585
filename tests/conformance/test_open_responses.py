"""What the public compliance tests of Open Responses ask for, by name: passed or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gateway.protocols import ENDPOINTS
from tests.conformance.open_responses import CASES
from tests.gateway.fakes import saying, tiny_tokenizer
from tests.gateway.responses.streams import PATH, respond, stream, texts_of
from tests.gateway.stack import Stack, post, running_stack
from tests.gateway.text.tool_formats.test_tools import TEMPLATE

NEEDED = {
    *("id", "object", "created_at", "completed_at", "status", "incomplete_details", "model"),
    *("previous_response_id", "instructions", "output", "error", "tools", "tool_choice"),
    *("truncation", "parallel_tool_calls", "text", "top_p", "presence_penalty"),
    *("frequency_penalty", "top_logprobs", "temperature", "reasoning", "usage"),
    *("max_output_tokens", "max_tool_calls", "store", "background", "service_tier", "metadata"),
    *("safety_identifier", "prompt_cache_key"),
}
"""Fields that the specification requires of every response."""
NUMBERS = ("top_p", "presence_penalty", "frequency_penalty", "top_logprobs", "temperature")
"""Those that may not be null though they may be left out of requests."""
FORECAST = {
    "type": "function",
    "name": "forecast",
    "description": "Tells tomorrow's weather of a town.",
    "parameters": {
        "type": "object",
        "properties": {"town": {"type": "string"}},
        "required": ["town"],
    },
}
CALL = '<tool_call>\n{"name": "forecast", "arguments": {"town": "Oslo"}}\n</tool_call>'


@pytest.fixture(scope="module")
def scripted() -> Iterator[Stack]:
    """A gateway with tools, whose model says what a test wants."""
    with running_stack(tokenizer=tiny_tokenizer(TEMPLATE)) as stack:
        yield stack


@pytest.fixture
def model(scripted: Stack) -> Iterator[Stack]:
    with scripted.as_new():
        scripted.engine.script = saying("hello there")
        yield scripted


def message(role: str, text: str, **more: Any) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": text, **more}


def check(response: dict[str, Any]) -> None:
    """It is complete, and has all that the specification requires."""
    assert response.keys() >= NEEDED
    assert response["status"] == "completed"
    assert response["output"]
    assert response["object"] == "response"
    assert all(isinstance(response[name], int | float) for name in NUMBERS)


def basic_response(model: Stack) -> None:
    check(respond(model, input=[message("user", "Greet me.")]))


def streaming_response(model: Stack) -> None:
    events = stream(model, input=[message("user", "Count.")])
    check(events[-1]["response"])
    assert events[-1]["type"] == "response.completed"


def system_prompt(model: Stack) -> None:
    check(respond(model, input=[message("system", "Rhyme."), message("user", "Greet me.")]))
    prompt = tiny_tokenizer().decode(model.engine.requests[-1].prompt, False)
    assert prompt.startswith("<|system|>Rhyme.")


def tool_calling(model: Stack) -> None:
    model.engine.script = saying(CALL)
    asked = {"input": [message("user", "And tomorrow?")], "tools": [FORECAST]}
    check(respond(model, **asked))
    events = stream(model, **asked)
    check(events[-1]["response"])
    assert texts_of(events[-1]["response"]) == [("function_call", '{"town": "Oslo"}')]


def multi_turn(model: Stack) -> None:
    turns = ["I am Ada.", "Hello Ada.", "Who am I?"]
    roles = ("user", "assistant", "user")
    check(respond(model, input=list(map(message, roles, turns))))
    prompt = tiny_tokenizer().decode(model.engine.requests[-1].prompt, False)
    assert all(turn in prompt for turn in turns)


def assistant_phase(model: Stack) -> None:
    check(
        respond(
            model,
            input=[
                message("assistant", "I look it up.", phase="commentary"),
                message("assistant", "It is nine.", phase="final_answer"),
                message("user", "Again?"),
            ],
        )
    )


def output_phase(model: Stack) -> None:
    response = respond(model, input="x")
    check(response)
    assert all("phase" not in item for item in response["output"])


def image_input(model: Stack) -> None:
    picture = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
    parts = [{"type": "input_text", "text": "What is it?"}, picture]
    answer = post(model, PATH, input=[{"role": "user", "content": parts}])
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("input[0].content", "unsupported_parameter")


def compact(model: Stack) -> None:
    for more in ({}, {"model": "tiny"}):
        answer = post(model, f"{PATH}/compact", input=[message("user", "x")], **more)
        assert answer.status_code == 405
        error = answer.json()["error"]
        assert error["message"] == "POST is not allowed for /v1/responses/compact"


def websocket(model: Stack) -> None:
    upgrade = {
        "connection": "Upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    answer = model.http.get(PATH, headers=upgrade)
    assert answer.status_code == 405
    assert answer.json()["error"]["message"] == "GET is not allowed for /v1/responses"


CHECKS: dict[str, Callable[[Stack], None]] = {
    "basic-response": basic_response,
    "streaming-response": streaming_response,
    "system-prompt": system_prompt,
    "tool-calling": tool_calling,
    "multi-turn": multi_turn,
    "assistant-phase": assistant_phase,
    "response-output-phase-schema": output_phase,
    "image-input": image_input,
    "compact-response": compact,
    "compact-missing-model": compact,
    **{case.name: websocket for case in CASES if case.name.startswith("websocket-")},
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_test_of_the_suite(model: Stack, case: Any) -> None:
    CHECKS[case.name](model)
    assert bool(model.engine.requests) is (case.result == "passes")


def test_the_list_is_whole() -> None:
    assert len({case.name for case in CASES}) == len(CASES) == 17
    assert all(case.because for case in CASES if case.result == "refused")
    assert not any("compact" in endpoint.path for endpoint in ENDPOINTS)
