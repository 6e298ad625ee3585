"""Cached prompt tokens in the usage, and the salt on its way to the engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf import json_format

from cluster.config.cluster import EngineSection
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.sse_client import read_events
from tests.gateway.stack import Stack, complete, post, running_stack

SAMPLING = {"max_tokens": 3, "n": 2}


@pytest.fixture(scope="module")
def stack_without() -> Iterator[Stack]:
    """A gateway whose engines keep no prefixes."""
    with running_stack(engine=EngineSection(enable_prefix_caching=False)) as stack:
        yield stack


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What both ways to ask over gRPC gave."""

    whole: pb.GenerateResponse
    chunks: list[pb.GenerateChunk]
    trailing: dict[str, str | bytes]
    """Metadata of the stream."""


def _generate(stack: Stack, **fields: Any) -> Answers:
    request = json_format.ParseDict(
        {"text": "hello", "sampling_params": SAMPLING, **fields}, pb.GenerateRequest()
    )
    with grpc.insecure_channel(stack.grpc_target) as channel:
        stub = InferenceStub(channel)
        call = stub.GenerateStream(request)
        chunks, trailing = list(call), dict(call.trailing_metadata())
        return Answers(whole=stub.Generate(request), chunks=chunks, trailing=trailing)


def test_usage_counts_the_cached_tokens_of_each_prompt_once(stack: Stack) -> None:
    stack.engine.num_cached_tokens = 4
    answer = complete(stack, prompt=["hello", "x"], max_tokens=3, n=2)
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 8}
    chat = post(stack, "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}])
    assert chat.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}


def test_the_usage_of_a_stream_has_it_too(stack: Stack) -> None:
    stack.engine.num_cached_tokens = 4
    options = {"include_usage": True}
    chunks = read_events(stack, "/v1/completions", prompt="a", n=2, stream_options=options)
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}


def test_grpc_has_it_in_the_first_chunk_and_at_the_end(stack: Stack) -> None:
    stack.engine.num_cached_tokens = 4
    answers = _generate(stack)
    assert answers.whole.usage.cached_tokens == 4
    assert [c.finish_info.usage.cached_tokens for c in answers.whole.choices] == [4, 4]
    reported = [c for c in answers.chunks if c.HasField("cached_tokens")]
    assert [(c.choice_index, c.cached_tokens) for c in reported] == [(0, 4), (1, 4)]
    assert answers.chunks[-1].finish_info.usage.cached_tokens == 4
    assert answers.trailing["x-cached-tokens"] == "4"


def test_without_the_cache_nothing_is_reported(stack_without: Stack) -> None:
    stack_without.engine.num_cached_tokens = 4
    answer = complete(stack_without, prompt="hello", max_tokens=3)
    assert "prompt_tokens_details" not in answer["usage"]
    answers = _generate(stack_without)
    assert answers.whole.usage.cached_tokens == 0
    assert not any(c.HasField("cached_tokens") for c in answers.chunks)
    assert "x-cached-tokens" not in answers.trailing


def test_the_salt_reaches_the_engine(stack: Stack) -> None:
    complete(stack, prompt=["a", "b"], cache_salt="tenant")
    complete(stack, prompt="a")
    _generate(stack, cache_salt="other")
    salts = [request.cache_salt for request in stack.engine.requests]
    assert salts == ["tenant", "tenant", "", "other", "other"]


def test_hints_reach_the_engine(stack: Stack) -> None:
    complete(stack, prompt="a", session_id="s", cache_ttl=30, prompt_cache_key="k")
    complete(stack, prompt="a", prompt_cache_key="k", cache_ttl=0)
    complete(stack, prompt="a", session_id=None, cache_ttl=None)
    _generate(stack, session_id="t", cache_ttl=0.5)
    hints = [(request.session, request.cache_ttl_s) for request in stack.engine.requests]
    assert hints == [("s", 30.0), ("k", 0.0), ("", None), ("t", 0.5), ("t", 0.5)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cache_ttl", -1),
        ("cache_ttl", 3601),
        ("cache_ttl", "5"),
        ("session_id", ""),
        ("session_id", 5),
        ("prompt_cache_key", ["k"]),
    ],
)
def test_a_bad_hint_is_refused_by_name(stack: Stack, name: str, value: object) -> None:
    response = post(stack, "/v1/completions", prompt="a", **{name: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == name
    assert not stack.engine.requests


@pytest.mark.parametrize("salt", ["", "x" * 257, 5])
def test_a_bad_salt_is_refused_by_name(stack: Stack, salt: object) -> None:
    response = post(stack, "/v1/completions", prompt="a", cache_salt=salt)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "cache_salt"
    assert not stack.engine.requests
