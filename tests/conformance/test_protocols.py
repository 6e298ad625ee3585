"""Chat, Responses and Messages are codecs of one call: a conversation has the same outcome."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from tests.conformance.conftest import TOOL_TEMPLATE
from tests.gateway.fakes import saying, tiny_tokenizer
from tests.gateway.sse_client import by_choice, parse_events
from tests.gateway.stack import MODEL, Stack, running_stack
from workers.requests.request import Request

pytestmark = pytest.mark.heavy

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
PATHS = (CHAT, RESPONSES, MESSAGES)
SYSTEM, QUESTION = "Be brief.", "Who is there?"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"word": {"enum": ["king", "queen"]}},
    "required": ["word"],
    "additionalProperties": False,
}
FUNCTION = {"name": "look_up", "description": "Looks.", "parameters": SCHEMA}
GIVEN = '{"word": "king"}'


@dataclass(frozen=True, kw_only=True)
class Talk:
    """One conversation, in the words of each protocol."""

    turns: tuple[tuple[str, str], ...] = (("user", QUESTION),)
    """Roles and texts; ``call`` and ``result`` are of the function."""
    has_tools: bool = False
    must_call: bool = False
    has_schema: bool = False
    stop: tuple[str, ...] = ()
    max_tokens: int = 12
    top_p: float | None = None
    model: str = MODEL
    temperature: float = 0
    schema: dict[str, Any] | None = None
    """Another one of the function's arguments."""

    def bodies(self) -> dict[str, dict[str, Any]]:
        return {CHAT: self._chat(), RESPONSES: self._responses(), MESSAGES: self._messages()}

    @property
    def _common(self) -> dict[str, Any]:
        sampling = {} if self.top_p is None else {"top_p": self.top_p}
        return {"model": self.model, "temperature": self.temperature, **sampling}

    @property
    def _function(self) -> dict[str, Any]:
        return {**FUNCTION, "strict": True, "parameters": self.schema or SCHEMA}

    def _chat(self) -> dict[str, Any]:
        said: dict[str, Any] = {
            "call": lambda text: {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "c1",
                        "type": "function",
                        "function": {"name": "look_up", "arguments": text},
                    }
                ],
            },
            "result": lambda text: {"role": "tool", "tool_call_id": "c1", "content": text},
        }
        messages = [
            said[role](text) if role in said else {"role": role, "content": text}
            for role, text in self.turns
        ]
        messages.insert(0, {"role": "system", "content": SYSTEM})
        body = {**self._common, "messages": messages, "max_tokens": self.max_tokens}
        if self.has_tools:
            body |= {"tools": [{"type": "function", "function": self._function}]}
            body |= {"parallel_tool_calls": False}
        if self.must_call:
            body["tool_choice"] = "required"
        if self.has_schema:
            wanted = {"name": "answer", "schema": SCHEMA}
            body["response_format"] = {"type": "json_schema", "json_schema": wanted}
        return body | ({"stop": list(self.stop)} if self.stop else {})

    def _responses(self) -> dict[str, Any]:
        said: dict[str, Any] = {
            "call": lambda text: {
                "type": "function_call",
                "call_id": "c1",
                "name": "look_up",
                "arguments": text,
            },
            "result": lambda text: {
                "type": "function_call_output",
                "call_id": "c1",
                "output": text,
            },
        }
        items = [
            said[role](text) if role in said else {"role": role, "content": text}
            for role, text in self.turns
        ]
        body = {**self._common, "input": items, "instructions": SYSTEM, "store": False}
        body["max_output_tokens"] = self.max_tokens
        if self.has_tools:
            body |= {"tools": [{"type": "function", **self._function}]}
            body |= {"parallel_tool_calls": False}
        if self.must_call:
            body["tool_choice"] = "required"
        if self.has_schema:
            wanted = {"type": "json_schema", "name": "answer", "schema": SCHEMA}
            body["text"] = {"format": wanted}
        return body | ({"stop": list(self.stop)} if self.stop else {})

    def _messages(self) -> dict[str, Any]:
        said: dict[str, Any] = {
            "call": lambda text: (
                "assistant",
                [{"type": "tool_use", "id": "c1", "name": "look_up", "input": json.loads(text)}],
            ),
            "result": lambda text: (
                "user",
                [{"type": "tool_result", "tool_use_id": "c1", "content": text}],
            ),
        }
        turns = [said[role](text) if role in said else (role, text) for role, text in self.turns]
        messages = [{"role": role, "content": content} for role, content in turns]
        body = {**self._common, "messages": messages, "system": SYSTEM}
        body["max_tokens"] = self.max_tokens
        if self.has_tools:
            tool = {**self._function, "input_schema": self._function["parameters"]}
            kind = "any" if self.must_call else "auto"
            body["tools"] = [{k: v for k, v in tool.items() if k != "parameters"}]
            body["tool_choice"] = {"type": kind, "disable_parallel_tool_use": True}
        if self.has_schema:
            body["output_config"] = {"format": {"type": "json_schema", "schema": SCHEMA}}
        return body | ({"stop_sequences": list(self.stop)} if self.stop else {})


TALKS = {
    "a question": Talk(),
    "more turns": Talk(
        turns=(("user", "Hi."), ("assistant", "Good day."), ("user", QUESTION)), max_tokens=20
    ),
    "a stop string": Talk(stop=("e", "\n\n"), max_tokens=200),
    "a schema": Talk(has_schema=True, max_tokens=60),
    "tools": Talk(has_tools=True),
    "a call": Talk(has_tools=True, must_call=True, max_tokens=200),
    "after a call": Talk(
        turns=(("user", QUESTION), ("call", GIVEN), ("result", "a man"), ("user", "So?")),
        has_tools=True,
    ),
    "the end of the context": Talk(turns=(("user", "word " * 700),), max_tokens=9),
}
Outcome = tuple[str, list[tuple[str, Any]], str, int, int]
"""Text, calls, how it ended, tokens of the prompt and of the answer."""
CUT, DONE, CALLED = "cut", "done", "called"


def chat_outcome(body: dict[str, Any]) -> Outcome:
    (choice,), usage = body["choices"], body["usage"]
    message, ends = choice["message"], {"length": CUT, "stop": DONE, "tool_calls": CALLED}
    called = [call["function"] for call in message.get("tool_calls") or ()]
    calls = [(call["name"], json.loads(call["arguments"])) for call in called]
    counts = usage["prompt_tokens"], usage["completion_tokens"]
    return message["content"] or "", calls, ends[choice["finish_reason"]], *counts


def responses_outcome(body: dict[str, Any]) -> Outcome:
    items, usage = body["output"], body["usage"]
    parts = [part for item in items if item["type"] == "message" for part in item["content"]]
    called = [item for item in items if item["type"] == "function_call"]
    calls = [(call["name"], json.loads(call["arguments"])) for call in called]
    end = CUT if body["status"] == "incomplete" else CALLED if called else DONE
    counts = usage["input_tokens"], usage["output_tokens"]
    return "".join(part["text"] for part in parts), calls, end, *counts


def messages_outcome(body: dict[str, Any]) -> Outcome:
    ends = {"max_tokens": CUT, "end_turn": DONE, "stop_sequence": DONE, "tool_use": CALLED}
    usage = body["usage"]
    text = "".join(block["text"] for block in body["content"] if block["type"] == "text")
    called = [block for block in body["content"] if block["type"] == "tool_use"]
    calls = [(call["name"], call["input"]) for call in called]
    num_prompt = usage["input_tokens"] + usage["cache_read_input_tokens"]
    return text, calls, ends[body["stop_reason"]], num_prompt, usage["output_tokens"]


OUTCOMES = {CHAT: chat_outcome, RESPONSES: responses_outcome, MESSAGES: messages_outcome}


def sent(stack: Stack, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = stack.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize("name", TALKS)
def test_the_same_conversation_has_the_same_outcome(stack: Stack, name: str) -> None:
    """Of the bundled model."""
    bodies = TALKS[name].bodies()
    outcomes = {
        path: OUTCOMES[path](sent(stack, path, body | {"model": stack.gateway.model.name}))
        for path, body in bodies.items()
    }
    assert outcomes[RESPONSES] == outcomes[CHAT]
    assert outcomes[MESSAGES] == outcomes[CHAT]
    text, calls, *_ = outcomes[CHAT]
    assert text or calls


@pytest.fixture(scope="module")
def scripted() -> Iterator[Stack]:
    """An engine that keeps what it gets."""
    with running_stack(tokenizer=tiny_tokenizer(TOOL_TEMPLATE)) as stack:
        yield stack


@pytest.mark.parametrize("name", [name for name in TALKS if name != "the end of the context"])
def test_the_engine_gets_the_same_request(scripted: Stack, name: str) -> None:
    """Prompt, sampling, grammar and limits: so the tokens are the same, whatever the model."""
    with scripted.as_new():
        scripted.engine.script = saying("x")
        for path, body in TALKS[name].bodies().items():
            sent(scripted, path, body)
        first, *others = map(_plain, scripted.engine.requests)
    assert others == [first, first]


def _plain(request: Request) -> Request:
    """A request without its name, its time, the seed that was drawn, and names of fields."""
    params = replace(request.params, seed=0)
    if params.grammar is not None:
        parts = tuple(replace(part, label="") for part in params.grammar.parts)
        params = replace(params, grammar=replace(params.grammar, field="", parts=parts))
    return replace(request, request_id="", deadline_ms=0, params=params)


def test_streams_have_the_same_text(stack: Stack) -> None:
    texts = {}
    for path, body in TALKS["more turns"].bodies().items():
        body |= {"model": stack.gateway.model.name, "stream": True}
        texts[path] = _streamed(stack.http.post(path, json=body).text)
    assert texts[CHAT]
    assert set(texts.values()) == {texts[CHAT]}


def _streamed(text: str) -> str:
    """The words in a stream of any of the protocols."""
    if "chat.completion.chunk" in text:
        entries = by_choice(parse_events(text))[0]
        return "".join(entry["delta"].get("content", "") for entry in entries)
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line[:7] == "data: {"]
    events = [json.loads(line) for line in lines]
    deltas = [e["delta"] for e in events if e["type"] == "response.output_text.delta"]
    deltas += [e["delta"]["text"] for e in events if e["type"] == "content_block_delta"]
    return "".join(deltas)


WRONG = {
    "unknown model": (Talk(model="other"), 404, "not_found_error"),
    "temperature": (Talk(temperature=-1), 400, "invalid_request_error"),
    "top_p": (Talk(top_p=2.0), 400, "invalid_request_error"),
    "no tokens": (Talk(max_tokens=0), 400, "invalid_request_error"),
    "stop": (Talk(stop=("",)), 400, "invalid_request_error"),
    "stops": (Talk(stop=("a",) * 17), 400, "invalid_request_error"),
    "long prompt": (Talk(turns=(("user", "word " * 9000),)), 400, "invalid_request_error"),
    "schema": (Talk(has_tools=True, schema={"type": 5}), 400, "invalid_request_error"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_of_the_same_class(scripted: Stack, name: str) -> None:
    talk, status, kind = WRONG[name]
    answers = {}
    scripted.engine.requests.clear()
    for path, body in talk.bodies().items():
        for more in ({}, {"stream": True}):
            answers[path] = scripted.http.post(path, json={**body, **more})
            assert answers[path].status_code == status, answers[path].text
    chat, responses, messages = (_error(answers[path]) for path in PATHS)
    assert responses["code"] == chat["code"]
    assert responses["type"] == chat["type"]
    assert messages["type"] == kind
    assert not scripted.engine.requests


def _error(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    return error
