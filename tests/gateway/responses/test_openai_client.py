"""openai-python works unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from cluster.config.gateway import GatewaySection
from tests.gateway.fakes import saying, tiny_tokenizer
from tests.gateway.responses.test_streams import NOW, PATCH, WEATHER
from tests.gateway.stack import MODEL, WAIT_S, Stack, running_stack
from tests.gateway.text.harmony.examples import SUM
from tests.gateway.text.tool_formats.test_tools import ARGUMENTS, BOTH
from tests.gateway.text.tool_formats.test_tools import TEMPLATE as TOOL_TEMPLATE

INPUT: Any = [{"role": "user", "content": "hi"}]
REASONING = (
    "{% for m in messages %}<|start|>{{ m.role }}<|channel|>"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% endfor %}<|start|>assistant"
)
"""A template whose model answers in the Harmony format, and that repeats all reasoning."""


@pytest.fixture(scope="module")
def shared_storing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("state") / "state"
    section = GatewaySection(state_dir=str(folder), request_timeout_s=WAIT_S)
    with running_stack(section, tiny_tokenizer(TOOL_TEMPLATE)) as stack:
        yield stack


@pytest.fixture
def storing(shared_storing: Stack) -> Iterator[Stack]:
    """A gateway with tools and a state folder."""
    with shared_storing.as_new():
        yield shared_storing


@pytest.fixture
def client(storing: Stack) -> Iterator[openai.OpenAI]:
    with client_of(storing) as client:
        yield client


def client_of(stack: Stack) -> openai.OpenAI:
    """A client as a user makes it, without retries so that errors show."""
    url = f"{stack.url}/v1"
    return openai.OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=WAIT_S)


def test_text(storing: Stack, client: openai.OpenAI) -> None:
    storing.engine.script = saying("hello world")
    answer = client.responses.create(model=MODEL, input="hi", temperature=0, max_output_tokens=50)
    assert answer.output_text == "hello world"
    assert answer.status == "completed"
    assert answer.usage is not None
    assert answer.usage.output_tokens == 6
    events = list(client.responses.create(model=MODEL, input=INPUT, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == "hello world"
    assert events[-1].type == "response.completed"


def test_its_own_stream_helper(storing: Stack, client: openai.OpenAI) -> None:
    storing.engine.script = saying(BOTH)
    tools: Any = [{**WEATHER, "strict": True}, {**NOW, "parameters": None, "strict": False}]
    with client.responses.stream(model=MODEL, input=INPUT, tools=tools) as stream:
        snapshots = [e.snapshot for e in stream if e.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert snapshots[-1] == "On it.\n"
    message, first, second = final.output
    assert message.type == "message"
    assert first.type == second.type == "function_call"
    assert (first.name, first.parsed_arguments) == ("weather", json.loads(ARGUMENTS))
    assert second.arguments == "{}"


class Weather(BaseModel):
    """A form of the text."""

    city: str
    days: int


def test_parsed_text(storing: Stack, client: openai.OpenAI) -> None:
    storing.engine.script = saying('{"city": "Ems", "days": 3}')
    found = client.responses.parse(model=MODEL, input="hi", text_format=Weather)
    assert found.output_parsed == Weather(city="Ems", days=3)
    grammar = storing.engine.requests[-1].params.grammar
    assert grammar is not None
    assert json.loads(grammar.text)["required"] == ["city", "days"]


def test_a_loop_with_tools(storing: Stack, client: openai.OpenAI) -> None:
    """The output goes back as it came, with what the tools said."""
    storing.engine.script = saying(BOTH)
    tools: Any = [WEATHER, NOW, PATCH]
    first = client.responses.create(model=MODEL, input=INPUT, tools=tools, store=False)
    calls = [item for item in first.output if item.type == "function_call"]
    history = [*INPUT, *(item.model_dump(exclude_none=True) for item in first.output)]
    history += [
        {"type": "function_call_output", "call_id": call.call_id, "output": f"{call.name}: fine"}
        for call in calls
    ]
    storing.engine.script = saying("Sunny.")
    second = client.responses.create(model=MODEL, input=history, tools=tools, store=False)
    assert second.output_text == "Sunny."
    prompt = tiny_tokenizer().decode(storing.engine.requests[-1].prompt, False)
    assert "<|assistant|>On it.\n<tool_call>" in prompt
    assert prompt.index("weather: fine") < prompt.index("now: fine")


def test_a_loop_with_the_server_s_memory(storing: Stack, client: openai.OpenAI) -> None:
    storing.engine.script = saying(BOTH)
    tools: Any = [WEATHER, NOW]
    first = client.responses.create(model=MODEL, input=INPUT, tools=tools)
    outputs: Any = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "fine"}
        for item in first.output
        if item.type == "function_call"
    ]
    storing.engine.script = saying("Sunny.")
    asked: Any = {"model": MODEL, "input": outputs, "tools": tools}
    second = client.responses.create(**asked, previous_response_id=first.id)
    assert second.output_text == "Sunny."
    assert client.responses.retrieve(second.id).output_text == "Sunny."
    listed = list(client.responses.input_items.list(second.id, order="asc", limit=2))
    assert len(listed) == 6  # the message, words, two calls, two outputs; over three pages
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(first.id)


def test_reasoning_goes_back() -> None:
    with running_stack(tokenizer=tiny_tokenizer(REASONING)) as stack, client_of(stack) as client:
        stack.engine.script = saying(SUM)
        with client.responses.stream(model=MODEL, input=INPUT) as stream:
            thoughts = [e.delta for e in stream if e.type == "response.reasoning_text.delta"]
            output = stream.get_final_response().output
        assert "".join(thoughts).startswith("User asks: ")
        assert [item.type for item in output] == ["reasoning", "message"]
        history = [*INPUT, *(item.model_dump(exclude_none=True) for item in output), *INPUT]
        client.responses.create(model=MODEL, input=history, max_output_tokens=1)
        prompt = tiny_tokenizer().decode(stack.engine.requests[-1].prompt, False)
        assert "(User asks: " in prompt


def test_errors_are_the_client_s_own(storing: Stack, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.responses.create(model=MODEL, input="x", temperature=-1)
    assert (caught.value.param, caught.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.NotFoundError, match="other"):
        client.responses.create(model="other", input="x")
    with pytest.raises(openai.BadRequestError, match="previous_response_id") as missing:
        client.responses.create(model=MODEL, input="x", previous_response_id="resp_1")
    assert missing.value.code == "previous_response_not_found"
    web: Any = [{"type": "web_search"}]
    with pytest.raises(openai.BadRequestError, match="web_search"):
        client.responses.create(model=MODEL, input="x", tools=web)


def test_an_error_in_a_stream_is_raised(storing: Stack, client: openai.OpenAI) -> None:
    storing.engine.step_s = 0.01
    stream = client.responses.create(model=MODEL, input="x", stream=True)
    next(stream)
    storing.engine.error = ("logits are not finite", "nan_logits")
    with pytest.raises(openai.APIError, match="logits are not finite"):
        list(stream)
