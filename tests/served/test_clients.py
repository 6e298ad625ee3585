"""Clients of a real server: openai-python and gRPC, and what they get is what the model says."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import grpc
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from benchmarks.harness.server import WAIT_S, Served
from expertmesh import LLM, SamplingParams
from protos import inference_pb2 as pb
from protos import types_pb2
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.grpc.test_grpc import failure, request_of
from tests.gateway.sse_client import by_choice, parse_events

pytestmark = pytest.mark.ray

MODEL = "expertmesh-demo"
PROMPT = "ROMEO:\nBut soft, what light"
GREEDY = {"max_tokens": 24, "temperature": 0.0}
SAMPLED = {"max_tokens": 24, "temperature": 1.0, "top_p": 0.95, "seed": 7}
PENALISED = {
    "max_tokens": 24,
    "temperature": 0.8,
    "top_k": 40,
    "repetition_penalty": 1.2,
    "seed": 1,
}
SETTINGS = pytest.mark.parametrize(
    "settings", [GREEDY, SAMPLED, PENALISED], ids=["greedy", "sampled", "penalised"]
)


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    """As a user makes it, but without retries, so that errors show."""
    url = f"{server.http}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=WAIT_S) as client:
        yield client


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """The same model in this process."""
    with LLM(dtype="float32", deterministic="on", num_threads=1) as llm:
        yield llm


# ---- the tokens -----------------------------------------------------------------------------


def http_answer(server: Served, **fields: Any) -> dict[str, Any]:
    """The first choice of a completion with token ids."""
    answer = server.complete(**fields, return_token_ids=True)
    choice: dict[str, Any] = answer["choices"][0]
    return choice


@SETTINGS
def test_tokens_are_those_of_the_model_in_this_process(
    server: Served, llm: LLM, settings: dict[str, Any]
) -> None:
    choice = http_answer(server, prompt=PROMPT, logprobs=0, **settings)
    prompt = choice["prompt_token_ids"]
    assert prompt == server.client.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    (result,) = llm.generate([prompt], SamplingParams(**settings, logprobs=0))
    (expected,) = result.outputs
    assert choice["token_ids"] == expected.token_ids
    assert expected.logprobs is not None
    pairs = zip(expected.token_ids, expected.logprobs, strict=True)
    values = [by_token[token].logprob for token, by_token in pairs]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(values, abs=1e-4)


def test_a_priority_changes_no_token(server: Served, stub: InferenceStub) -> None:
    plain = http_answer(server, prompt=PROMPT, **SAMPLED)["token_ids"]
    assert http_answer(server, prompt=PROMPT, priority=-5, **SAMPLED)["token_ids"] == plain
    settings = {**SAMPLED, "seed": str(SAMPLED["seed"])}
    request = request_of(text=PROMPT, priority=9, sampling_params=settings)
    assert list(stub.Generate(request, timeout=WAIT_S).choices[0].token_ids) == plain


@SETTINGS
@pytest.mark.parametrize("n", [1, 3])
def test_both_codecs_give_the_same(
    server: Served, stub: InferenceStub, settings: dict[str, Any], n: int
) -> None:
    fields = {"prompt": PROMPT, "logprobs": 2, "n": n, "return_token_ids": True, **settings}
    whole = server.complete(**fields)
    message = request_of(
        text=PROMPT,
        sampling_params={**settings, "n": n},
        output_options={"logprobs": 2, "return_token_ids": True},
    )
    answer = stub.Generate(message, timeout=WAIT_S)
    assert list(answer.prompt_token_ids) == whole["choices"][0]["prompt_token_ids"]
    assert len(answer.choices) == len(whole["choices"]) == n
    for ours, theirs in zip(answer.choices, whole["choices"], strict=True):
        assert list(ours.token_ids) == theirs["token_ids"]
        assert (ours.index, ours.text) == (theirs["index"], theirs["text"])
        reason = types_pb2.FinishReason.Name(ours.finish_info.reason)
        assert reason == f"FINISH_REASON_{theirs['finish_reason'].upper()}"
        got = [entry.logprob for entry in ours.logprobs]
        assert got == pytest.approx(theirs["logprobs"]["token_logprobs"], abs=1e-6)
    assert answer.usage.completion_tokens == whole["usage"]["completion_tokens"]

    chunks = list(stub.GenerateStream(message, timeout=WAIT_S))
    for choice in answer.choices:
        own = [chunk for chunk in chunks if chunk.choice_index == choice.index]
        assert [t for chunk in own for t in chunk.token_ids] == list(choice.token_ids)
        assert "".join(chunk.text for chunk in own) == choice.text

    response = server.client.post("/v1/completions", json={**fields, "stream": True})
    for index, entries in by_choice(parse_events(response.text)).items():
        expected = whole["choices"][index]
        assert "".join(entry["text"] for entry in entries) == expected["text"]
        streamed = [t for entry in entries for t in entry.get("token_ids") or ()]
        assert streamed == expected["token_ids"]
        assert entries[-1]["finish_reason"] == expected["finish_reason"]


def test_requests_together_equal_requests_alone(server: Served, stub: InferenceStub) -> None:
    """16 clients at once, on both ports, greedy and sampled, prompts of 1 to 300 tokens."""
    prompts = [[(7 * i + j) % 1024 for j in range(1 + 20 * i)] for i in range(16)]
    settings = [{**(GREEDY, SAMPLED)[i % 2], "ignore_eos": True} for i in range(16)]

    def over_http(i: int) -> list[int]:
        tokens: list[int] = http_answer(server, prompt=prompts[i], **settings[i])["token_ids"]
        return tokens

    def over_grpc(i: int) -> list[int]:
        message = request_of(token_ids={"ids": prompts[i]}, sampling_params=settings[i])
        return list(stub.Generate(message, timeout=WAIT_S).choices[0].token_ids)

    alone = [over_http(i) for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        together = [pool.submit((over_http, over_grpc)[i % 4 // 2], i) for i in range(16)]
        assert [future.result(WAIT_S) for future in together] == alone


# ---- openai-python --------------------------------------------------------------------------


def test_openai_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "expertmesh"


def test_openai_sees_what_was_cached(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": [[(5 * i) % 1000 for i in range(70)]]}
    settings: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
    salts: list[dict[str, str]] = [{}, {}, {"cache_salt": "tenant"}]
    answers = [client.completions.create(**asked, **settings, extra_body=s) for s in salts]
    assert len({answer.choices[0].text for answer in answers}) == 1
    details = [answer.usage and answer.usage.prompt_tokens_details for answer in answers]
    assert [d and d.cached_tokens for d in details] == [0, 64, 0]


def test_openai_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=20, seed=3, n=2, logprobs=2, echo=True
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 40
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 40
    assert answer.choices[0].text != answer.choices[1].text
    for index, choice in enumerate(answer.choices):
        assert (choice.index, choice.finish_reason) == (index, "length")
        assert choice.text.startswith(PROMPT)
        logprobs = choice.logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        assert logprobs.token_logprobs is not None
        assert len(logprobs.tokens) == answer.usage.prompt_tokens + 20
        assert logprobs.token_logprobs[0] is None
        assert all(value <= 0 for value in logprobs.token_logprobs[1:])


def test_openai_streams_and_seeds(client: openai.OpenAI) -> None:
    def streamed(seed: int) -> str:
        stream = client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=20, seed=seed, stream=True
        )
        return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)

    whole = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=20, seed=3)
    assert streamed(3) == whole.choices[0].text == streamed(3)
    assert streamed(4) != whole.choices[0].text


def test_openai_chat(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Who is Juliet?"}]}],
        "max_completion_tokens": 20,
        "seed": 5,
        "logprobs": True,
        "top_logprobs": 3,
        "extra_body": {"ignore_eos": True},
    }
    answer = client.chat.completions.create(**asked)
    (choice,) = answer.choices
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert choice.logprobs is not None
    entries = choice.logprobs.content
    assert entries is not None
    assert len(entries) == 20
    assert all(len(entry.top_logprobs) >= 3 for entry in entries)
    assert all(one.logprob >= two.logprob for e in entries for one, two in pairwise(e.top_logprobs))
    raw = b"".join(bytes(entry.bytes or ()) for entry in entries)
    assert raw.decode(errors="replace") == choice.message.content

    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == choice.message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage == answer.usage


@pytest.mark.parametrize(
    ("fields", "error", "code", "param"),
    [
        ({"temperature": -1.0}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"n": 1_000_000}, openai.BadRequestError, "invalid_value", "n"),
        ({"max_tokens": 5000}, openai.BadRequestError, "context_length_exceeded", "max_tokens"),
        ({"model": "gpt-17"}, openai.NotFoundError, "model_not_found", "model"),
        ({"suffix": "x"}, openai.BadRequestError, "unsupported_parameter", "suffix"),
    ],
)
def test_openai_errors_are_its_own_classes(
    client: openai.OpenAI,
    fields: dict[str, Any],
    error: type[openai.APIStatusError],
    code: str,
    param: str,
) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, **fields}
    for stream in (False, True):
        with pytest.raises(error) as caught:
            client.completions.create(**asked, stream=stream)
        assert (caught.value.code, caught.value.param) == (code, param)
        assert caught.value.request_id
    with pytest.raises(openai.NotFoundError):
        client.moderations.create(model=MODEL, input="x")


def test_openai_gives_up_in_time(client: openai.OpenAI, server: Served) -> None:
    """A client's own time limit ends the call, and the work with it."""
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(
            model=MODEL,
            prompt=PROMPT,
            max_tokens=4000,
            timeout=0.3,
            extra_body={"ignore_eos": True},
        )
    before = server.engine()["choices_length_total"]
    assert server.wait_idle()["choices_length_total"] == before


# ---- gRPC -----------------------------------------------------------------------------------


def test_grpc_tokens_and_models(server: Served, stub: InferenceStub) -> None:
    text = "Good morrow, cousin — naïve ☃"
    tokens = stub.Tokenize(pb.TokenizeRequest(prompt=text), timeout=WAIT_S)
    assert (tokens.count, tokens.max_model_len) == (len(tokens.tokens), 4096)
    back = stub.Detokenize(pb.DetokenizeRequest(tokens=list(tokens.tokens)), timeout=WAIT_S)
    assert back.prompt == text
    over_http = server.client.post("/tokenize", json={"prompt": text}).json()
    assert over_http["tokens"] == list(tokens.tokens)

    info = stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=WAIT_S)
    assert (info.id, info.model_type, info.dtype) == (MODEL, "olmoe", "float32")
    assert (info.max_model_len, info.vocab_size) == (4096, 1024)
    assert info.has_tokenizer
    assert info.has_chat_template
    assert list(stub.ListModels(pb.ListModelsRequest(), timeout=WAIT_S).models) == [info]


def test_grpc_chat_equals_http_chat(server: Served, stub: InferenceStub) -> None:
    messages = [{"role": "user", "content": "Who is Juliet?"}]
    body = {"messages": messages, "return_token_ids": True, **GREEDY}
    over_http = server.client.post("/v1/chat/completions", json=body).json()["choices"][0]
    message = request_of(messages={"messages": messages}, sampling_params=GREEDY)
    over_grpc = stub.Generate(message, timeout=WAIT_S).choices[0]
    assert list(over_grpc.token_ids) == over_http["token_ids"]
    assert over_grpc.text == over_http["message"]["content"]


def test_grpc_health_and_reflection(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    serving = health_pb2.HealthCheckResponse.SERVING
    for name in ("", "expertmesh.v1.Inference"):
        request = health_pb2.HealthCheckRequest(service=name)
        assert health.Check(request, timeout=WAIT_S).status == serving
        watch = health.Watch(request, timeout=WAIT_S)
        assert next(iter(watch)).status == serving
        watch.cancel()
    with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
        health.Check(health_pb2.HealthCheckRequest(service="nothing"), timeout=WAIT_S)

    asks = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="expertmesh.v1.Inference"),
    ]
    reflected = reflection_pb2_grpc.ServerReflectionStub(channel)
    listed, found = reflected.ServerReflectionInfo(iter(asks), timeout=WAIT_S)
    names = {service.name for service in listed.list_services_response.service}
    assert {"expertmesh.v1.Inference", "grpc.health.v1.Health"} <= names
    assert "expertmesh.v1.Engine" not in names
    assert found.file_descriptor_response.file_descriptor_proto


def test_a_grpc_deadline_ends_the_work(server: Served, stub: InferenceStub) -> None:
    before = server.wait_idle()
    message = request_of(text=PROMPT, sampling_params={"max_tokens": 4000, "ignore_eos": True})
    with pytest.raises(grpc.RpcError, match="DEADLINE_EXCEEDED"):
        list(stub.GenerateStream(message, timeout=0.5))
    after = server.wait_idle()
    assert after["choices_length_total"] == before["choices_length_total"]
    code, _, details = failure(lambda: stub.Generate(request_of(text=""), timeout=WAIT_S))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details["RequestInfo"].request_id
