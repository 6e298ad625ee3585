"""openai-python works unchanged."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from cluster.config.gateway import GatewaySection
from tests.gateway.fakes import saying
from tests.gateway.stack import MODEL, WAIT_S, Stack, running_stack


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    """A client as a user makes it, without retries so that errors show."""
    with openai.OpenAI(
        base_url=f"{stack.url}/v1", api_key="unused", max_retries=0, timeout=WAIT_S
    ) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "expertmesh"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_completions(stack: Stack, client: openai.OpenAI) -> None:
    stack.engine.script = saying("hello world")
    answer = client.completions.create(model=MODEL, prompt="x", max_tokens=50, logprobs=1)
    assert answer.choices[0].text == "hello world"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    stream = client.completions.create(model=MODEL, prompt="x", max_tokens=50, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "hello world"


def test_chat(stack: Stack, client: openai.OpenAI) -> None:
    stack.engine.script = saying("hello world")
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        logprobs=True,
        top_logprobs=2,
        extra_body={"min_tokens": 1},
    )
    assert answer.choices[0].message.content == "hello world"
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 6


def test_chat_streams(stack: Stack, client: openai.OpenAI) -> None:
    stack.engine.script = saying("hello world")
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "hello world"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6


def test_errors_are_the_clients_own(stack: Stack, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.completions.create(model=MODEL, prompt="x", temperature=-1)
    assert caught.value.param == "temperature"
    assert caught.value.code == "invalid_value"
    assert caught.value.request_id
    with pytest.raises(openai.NotFoundError, match="other"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="maximum context length") as too_long:
        client.completions.create(model=MODEL, prompt="x" * 5000)
    assert too_long.value.code == "context_length_exceeded"
    stack.engine.error = ("no room", "queue_full")
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model=MODEL, prompt="x")


def test_an_error_in_a_stream_is_raised(stack: Stack, client: openai.OpenAI) -> None:
    stack.engine.step_s = 0.01
    stream = client.completions.create(model=MODEL, prompt="x", max_tokens=400, stream=True)
    next(stream)
    stack.engine.error = ("logits are not finite", "nan_logits")
    with pytest.raises(openai.APIError, match="logits are not finite"):
        list(stream)


def test_keys() -> None:
    with running_stack(GatewaySection(api_keys=("secret",))) as stack:
        url = f"{stack.url}/v1"
        with (
            openai.OpenAI(base_url=url, api_key="wrong") as refused,
            pytest.raises(openai.AuthenticationError, match="not known"),
        ):
            refused.models.list()
        with openai.OpenAI(base_url=url, api_key="secret") as accepted:
            assert accepted.models.list().data
