"""Bad input of embeddings, classification and scores: the same error from both codecs."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import grpc
import pytest

from gateway.calls import pooling as pooling_module
from gateway.calls.inspect import MAX_JSON_BYTES
from gateway.core.tuning import GatewayTuning
from protos import inference_pb2 as pb
from protos import types_pb2
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.fakes import MAX_MODEL_LEN, VOCAB_SIZE
from tests.gateway.grpc.test_grpc import failure
from tests.gateway.stack import MODEL, Stack, post, running_stack

INVALID, CONTEXT, UNBUILT = "invalid_value", "context_length_exceeded", "unsupported_parameter"
MISSING = "missing_required_parameter"
PATHS = {"/v1/embeddings": "Embed", "/classify": "Classify", "/score": "Score"}


def _ids(*prompts: list[int]) -> list[pb.Input]:
    return [pb.Input(token_ids=types_pb2.TokenIds(ids=ids)) for ids in prompts]


BOTH: list[tuple[str, dict[str, Any], Any, str, str]] = [
    (
        "/v1/embeddings",
        {"input": [[5, VOCAB_SIZE]]},
        pb.EmbedRequest(input=_ids([5, VOCAB_SIZE])),
        "input",
        INVALID,
    ),
    ("/v1/embeddings", {"input": []}, pb.EmbedRequest(), "input", INVALID),
    ("/v1/embeddings", {"input": [[]]}, pb.EmbedRequest(input=_ids([])), "input", INVALID),
    (
        "/v1/embeddings",
        {"input": [[5]] * 257},
        pb.EmbedRequest(input=_ids(*[[5]] * 257)),
        "input",
        INVALID,
    ),
    (
        "/v1/embeddings",
        {"input": [5] * (MAX_MODEL_LEN + 1)},
        pb.EmbedRequest(input=_ids([5] * (MAX_MODEL_LEN + 1))),
        "input",
        "context_length_exceeded",
    ),
    (
        "/v1/embeddings",
        {"input": [5], "pooling": "max"},
        pb.EmbedRequest(input=_ids([5]), pooling="max"),
        "pooling",
        INVALID,
    ),
    (
        "/v1/embeddings",
        {"input": [5], "cache_salt": ""},
        pb.EmbedRequest(input=_ids([5]), cache_salt=""),
        "cache_salt",
        INVALID,
    ),
    (
        "/score",
        {"queries": [5], "documents": [6], "cache_salt": "s" * 10_000},
        pb.ScoreRequest(queries=_ids([5]), documents=_ids([6]), cache_salt="s" * 10_000),
        "cache_salt",
        INVALID,
    ),
    ("/classify", {"input": [5]}, pb.ClassifyRequest(input=_ids([5])), "labels", MISSING),
    (
        "/classify",
        {"input": [5], "labels": ["a", ""]},
        pb.ClassifyRequest(input=_ids([5]), labels=["a", ""]),
        "labels",
        INVALID,
    ),
    (
        "/classify",
        {"input": [[5]] * 200, "labels": ["a", "b", "c"]},
        pb.ClassifyRequest(input=_ids(*[[5]] * 200), labels=["a", "b", "c"]),
        "labels",
        INVALID,
    ),
    (
        "/classify",
        {"input": [5, 6], "labels": ["a"], "attention_mask": [1]},
        pb.ClassifyRequest(
            input=_ids([5, 6]), labels=["a"], attention_mask=[pb.AttentionMask(mask=[1])]
        ),
        "attention_mask",
        INVALID,
    ),
    (
        "/score",
        {"queries": [[5], [6]], "documents": [[5], [6], [7]]},
        pb.ScoreRequest(queries=_ids([5], [6]), documents=_ids([5], [6], [7])),
        "queries",
        INVALID,
    ),
    (
        "/score",
        {"queries": [5], "documents": [[]]},
        pb.ScoreRequest(queries=_ids([5]), documents=_ids([])),
        "documents",
        INVALID,
    ),
]


def _inspect(prompt: list[int], *outputs: str, **fields: Any) -> pb.InspectRequest:
    return pb.InspectRequest(token_ids=[types_pb2.TokenIds(ids=prompt)], outputs=outputs, **fields)


INSPECT: list[tuple[dict[str, Any], pb.InspectRequest, str, str]] = [
    ({"token_ids": [5], "outputs": []}, _inspect([5]), "outputs", "must not be empty"),
    ({"token_ids": [5], "outputs": ["x"]}, _inspect([5], "x"), "outputs", "outputs has 'x'"),
    ({"token_ids": [], "outputs": ["loss"]}, _inspect([], "loss"), "token_ids", "empty"),
    (
        {"token_ids": [VOCAB_SIZE], "outputs": ["loss"]},
        _inspect([VOCAB_SIZE], "loss"),
        "token_ids",
        "not in the vocabulary",
    ),
    (
        {"token_ids": [5] * 257, "outputs": ["attentions"]},
        _inspect([5] * 257, "attentions"),
        "outputs",
        "attentions of 257 tokens are too many, at most 256",
    ),
    (
        {"token_ids": [5], "outputs": ["aux_loss"]},
        _inspect([5], "aux_loss"),
        "outputs",
        "not defined for this model",
    ),
    (
        {"token_ids": [5, 6], "outputs": ["loss"], "labels": [5]},
        _inspect([5, 6], "loss", labels=[pb.Labels(ids=[5])]),
        "labels",
        "labels has 1 entries for 2 tokens",
    ),
    (
        {"token_ids": [5, 6], "outputs": ["loss"], "labels": [5, VOCAB_SIZE]},
        _inspect([5, 6], "loss", labels=[pb.Labels(ids=[5, VOCAB_SIZE])]),
        "labels",
        "it must be -100 or 0 to",
    ),
    (
        {"token_ids": [5, 6], "outputs": ["loss"], "labels": [5, 6], "attention_mask": [0, 1]},
        _inspect(
            [5, 6],
            "loss",
            labels=[pb.Labels(ids=[5, 6])],
            attention_mask=[pb.AttentionMask(mask=[0, 1])],
        ),
        "labels",
        "must be -100 where attention_mask is 0",
    ),
    (
        {"token_ids": [5, 6], "outputs": ["logits"], "logits_to_keep": -1},
        _inspect([5, 6], "logits", logits_to_keep=-1),
        "logits_to_keep",
        "(-1) must not be negative",
    ),
    (
        {"token_ids": [5, 6], "outputs": ["logits"], "logits_to_keep": [1, 2]},
        _inspect([5, 6], "logits", logits_positions=[1, 2]),
        "logits_to_keep",
        "positions 1 to 2 are out of range for 2 tokens",
    ),
    (
        {"token_ids": [5, 6], "outputs": ["loss"], "labels": [5, 10**18]},
        _inspect([5, 6], "loss", labels=[pb.Labels(ids=[5, 10**18])]),
        "labels",
        "it must be -100 or 0 to",
    ),
    (
        {"token_ids": [5, 6], "outputs": ["loss"], "labels": [5, 1e300]},
        _inspect([5, 6], "loss", labels=[pb.Labels(values=[5, 1e300])]),
        "labels",
        "labels must be at most 1e+30 in size",
    ),
    (
        {"token_ids": [5, 6], "outputs": ["loss"], "labels": [5, 6.5]},
        _inspect([5, 6], "loss", labels=[pb.Labels(values=[5, 6.5])]),
        "labels",
        "labels must be token ids or -100",
    ),
    (
        {"token_ids": [5, 6], "outputs": ["logits"], "attention_mask": [1, 2]},
        _inspect([5, 6], "logits", attention_mask=[pb.AttentionMask(mask=[1, 2])]),
        "attention_mask",
        "attention_mask must contain only 0 and 1",
    ),
    (
        {"token_ids": [5, 6], "outputs": ["logits"], "attention_mask": [0, 0]},
        _inspect([5, 6], "logits", attention_mask=[pb.AttentionMask(mask=[0, 0])]),
        "attention_mask",
        "must not exclude all tokens",
    ),
    (
        {"token_ids": [[5, 6], [7]], "outputs": ["logits"], "attention_mask": [[1, 1]]},
        pb.InspectRequest(
            token_ids=[types_pb2.TokenIds(ids=[5, 6]), types_pb2.TokenIds(ids=[7])],
            outputs=["logits"],
            attention_mask=[pb.AttentionMask(mask=[1, 1])],
        ),
        "attention_mask",
        "attention_mask has 1 entries for 2 prompts",
    ),
    (
        {"token_ids": [5] * 9, "outputs": ["logits"], "logits_to_keep": [3, 3]},
        _inspect([5] * 9, "logits", logits_positions=[3, 3]),
        "logits_to_keep",
        "must be ascending positions",
    ),
    (
        {"token_ids": [[5] * 512] * 300, "outputs": ["loss"]},
        pb.InspectRequest(token_ids=[types_pb2.TokenIds(ids=[5] * 512)] * 300, outputs=["loss"]),
        "token_ids",
        "300 entries, at most 256",
    ),
]


@pytest.mark.parametrize(("fields", "message", "param", "text"), INSPECT)
def test_both_codecs_refuse_inspections_alike(
    stack: Stack, fields: dict[str, Any], message: pb.InspectRequest, param: str, text: str
) -> None:
    response = post(stack, "/v1/inspect", **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, INVALID)
    assert text in error["message"]
    with grpc.insecure_channel(stack.grpc_target) as channel:
        status, refusal, _ = failure(lambda: list(InferenceStub(channel).Inspect(message)))
    assert (status, refusal) == (grpc.StatusCode.INVALID_ARGUMENT, error["message"])
    assert not stack.engine.requests


def test_an_answer_in_json_is_smaller(stack: Stack) -> None:
    """The size is reported before work starts, with the limit."""
    prompts = [[5] * MAX_MODEL_LEN] * 20
    response = post(stack, "/v1/inspect", token_ids=prompts, outputs=["logits"])
    size = 4 * 20 * MAX_MODEL_LEN * VOCAB_SIZE
    assert size > MAX_JSON_BYTES
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert f"{size} bytes, at most {MAX_JSON_BYTES}" in message
    assert not stack.engine.requests


def test_inspections_hold_a_bounded_number_of_bytes() -> None:
    request = _inspect([5] * 60, "logits")  # about 65 000 bytes
    with (
        running_stack(tuning=GatewayTuning(max_inspection_bytes=100_000)) as stack,
        grpc.insecure_channel(stack.grpc_target) as channel,
    ):
        stack.engine.is_paused = True
        stub = InferenceStub(channel)
        first: Any = stub.Inspect(request)
        stack.wait_for(lambda: bool(stack.engine.requests), "the first one")
        status, refusal, _ = failure(lambda: list(stub.Inspect(request)))
        assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "at most 100000 may be held" in refusal
        metrics = stack.gateway.metrics.render().decode()
        assert 'admission_rejections_total{model_name="tiny",reason="queue_full"} 1.0' in metrics
        response = post(stack, "/v1/inspect", token_ids=[5] * 60, outputs=["logits"])
        assert response.status_code == 429  # HTTP and gRPC have one limit
        assert "at most 100000 may be held" in response.text
        first.cancel()
        stack.wait_for(lambda: bool(stack.engine.aborts), "the abort")
        stack.engine.error = ("no room", "queue_full")
        stack.engine.is_paused = False
        status, refusal, _ = failure(lambda: list(stub.Inspect(request)))
        assert refusal == "no room"  # of the engine: the first one's bytes are free again


@pytest.mark.parametrize(("path", "fields", "message", "param", "code"), BOTH)
def test_both_codecs_refuse_alike(
    stack: Stack, path: str, fields: dict[str, Any], message: Any, param: str, code: str
) -> None:
    response = post(stack, path, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    with grpc.insecure_channel(stack.grpc_target) as channel:
        call = getattr(InferenceStub(channel), PATHS[path])
        status, text, details = failure(lambda: call(message))
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert details["ErrorInfo"].reason == code
    assert text == error["message"]
    assert not stack.engine.requests


@pytest.mark.parametrize(
    ("path", "fields", "param", "code"),
    [
        ("/v1/embeddings", {}, "input", MISSING),
        ("/v1/embeddings", {"input": 5}, "input", INVALID),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format", INVALID),
        ("/v1/embeddings", {"input": "a", "dimensions": 8}, "dimensions", "unsupported_parameter"),
        (
            "/v1/embeddings",
            {"input": "a", "truncate_prompt_tokens": 5},
            "truncate_prompt_tokens",
            "unsupported_parameter",
        ),
        ("/score", {"queries": "a"}, "documents", MISSING),
        (
            "/score",
            {"queries": "a", "text_1": "b", "documents": "c"},
            "queries",
            INVALID,
        ),
        ("/score", {"text_1": "", "text_2": "b"}, "text_1", INVALID),
        ("/score", {"text_1": "a", "text_2": ""}, "text_2", INVALID),
        ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1", INVALID),
        ("/score", {"text_1": [5] * 400, "text_2": [6] * 200}, "text_2", CONTEXT),
        ("/classify", {"input": "a", "attention_mask": [0.5]}, "attention_mask", INVALID),
        ("/classify", {"input": [[5], [6, None]]}, "input", INVALID),
        ("/classify", {"input": [5], "labels": "yes"}, "labels", INVALID),
        ("/classify", {"input": [5], "labels": [1]}, "labels", INVALID),
        ("/v1/embeddings", {"input": [[5], "a"]}, "input", INVALID),
        ("/v1/embeddings", {"input": [-1]}, "input", INVALID),
        ("/v1/embeddings", {"input": [10**400]}, "input", INVALID),
        ("/v1/embeddings", {"input": [5], "priority": 10**12}, "priority", INVALID),
        ("/v1/embeddings", {"input": [5], "prompt_embeds": "AAAA"}, "prompt_embeds", UNBUILT),
        ("/score", {"queries": [5], "documents": {"a": 1}}, "documents", INVALID),
        ("/score", {"queries": [5] * 400, "documents": [6] * 200}, "documents", CONTEXT),
        ("/v1/inspect", {"outputs": ["loss"]}, "token_ids", MISSING),
        ("/v1/inspect", {"token_ids": "a", "outputs": ["loss"]}, "token_ids", INVALID),
        ("/v1/inspect", {"token_ids": [5], "outputs": "loss"}, "outputs", INVALID),
        ("/v1/inspect", {"token_ids": [5], "outputs": ["loss"], "labels": [{}]}, "labels", INVALID),
        (
            "/v1/inspect",
            {"token_ids": [5], "outputs": ["loss"], "labels": [10**400]},
            "labels",
            INVALID,
        ),
        (
            "/v1/inspect",
            {"token_ids": [5], "outputs": ["logits"], "logits_to_keep": 1.5},
            "logits_to_keep",
            INVALID,
        ),
        (
            "/v1/inspect",
            {"token_ids": [5] * (MAX_MODEL_LEN + 1), "outputs": ["loss"]},
            "token_ids",
            CONTEXT,
        ),
        ("/classify", {"input": "a", "model": "other"}, "model", "model_not_found"),
    ],
)
def test_http_bodies_that_are_wrong(
    stack: Stack, path: str, fields: dict[str, Any], param: str, code: str
) -> None:
    response = post(stack, path, **fields)
    assert response.status_code == (404 if code == "model_not_found" else 400), response.text
    error = response.json()["error"]
    assert (error["param"].partition("[")[0], error["code"]) == (param, code)
    assert not stack.engine.requests


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["labels", "attention_mask", "token_ids", "logits_to_keep"])
def test_numbers_that_are_none(stack: Stack, field: str, number: str) -> None:
    """Python reads them in JSON."""
    rest = {"token_ids": [5, 6], "outputs": ["loss", "logits"]}
    body = json.dumps({**rest, field: "HERE"}).replace('"HERE"', f"[5, {number}]")
    response = stack.http.post(
        "/v1/inspect", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(field)
    assert not stack.engine.requests


def test_labels_that_are_no_numbers_are_refused_in_grpc(stack: Stack) -> None:
    request = _inspect([5, 6], "loss", labels=[pb.Labels(values=[5, math.nan])])
    with grpc.insecure_channel(stack.grpc_target) as channel:
        status, refusal, _ = failure(lambda: list(InferenceStub(channel).Inspect(request)))
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal == "labels must be finite numbers"


@pytest.mark.parametrize(
    ("shape", "data", "text"),
    [
        ([2, 3], b"", "has 0 bytes, [2, 3] float32 numbers have 24"),
        ([2**31, 2**31], b"abcd", "has 4 bytes"),
        ([0, 4], b"", "must be tokens and hidden size"),
        ([1, 2, 3], b"", "must be tokens and hidden size"),
        ([1, 1], struct.pack("<f", math.nan), "must be finite numbers"),
        ([1, 1], struct.pack("<f", math.inf), "must be finite numbers"),
    ],
)
def test_embeddings_that_are_wrong(stack: Stack, shape: list[int], data: bytes, text: str) -> None:
    given = types_pb2.Embeddings(shape=shape, data=data)
    with grpc.insecure_channel(stack.grpc_target) as channel:
        request = pb.GenerateRequest(embeddings=given)
        status, refusal, _ = failure(lambda: InferenceStub(channel).Generate(request))
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert text in refusal
    assert not stack.engine.requests


def test_a_grpc_prompt_needs_text_or_ids(stack: Stack) -> None:
    with grpc.insecure_channel(stack.grpc_target) as channel:
        stub = InferenceStub(channel)
        status, _, details = failure(lambda: stub.Embed(pb.EmbedRequest(input=[pb.Input()])))
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert details["ErrorInfo"].reason == MISSING


def test_priority_reaches_the_engine_and_errors_come_back(stack: Stack) -> None:
    stack.engine.error = ("no room", "queue_full")
    response = stack.http.post(
        "/v1/embeddings", json={"input": [5, 6], "model": MODEL}, headers={"x-priority": "7"}
    )
    assert response.status_code == 429
    assert response.headers["retry-after"]
    (request,) = stack.engine.requests
    assert (request.priority, request.params.max_tokens) == (7, 0)
    assert request.inspection is not None


def test_a_salt_reaches_the_engine_by_both_codecs(stack: Stack) -> None:
    stack.engine.error = ("no room", "queue_full")
    post(stack, "/v1/inspect", token_ids=[5, 6], outputs=["loss"], cache_salt="mine")
    with grpc.insecure_channel(stack.grpc_target) as channel:
        request = _inspect([5, 6], "loss", cache_salt="mine")
        failure(lambda: list(InferenceStub(channel).Inspect(request)))
    assert [one.cache_salt for one in stack.engine.requests] == ["mine", "mine"]


@pytest.mark.parametrize(
    ("path", "fields", "param", "words"),
    [
        (
            "/score",
            {"text_1": [1] * 10, "text_2": [[2] * 5] * 10},
            "text_1",
            "text_1 and text_2 have 150 tokens when joined, at most 149",
        ),
        (
            "/classify",
            {"input": [[1] * 10] * 5, "labels": ["a", "b", "c"]},
            "labels",
            "prompts and labels have 165 tokens when joined, at most 149",
        ),
    ],
)
def test_joined_texts_are_counted_before_they_are_joined(
    stack: Stack,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    fields: dict[str, Any],
    param: str,
    words: str,
) -> None:
    """A query stands in front of each document: a short body makes many tokens."""
    joined: list[int] = []
    join = pooling_module.scored_prompt

    def note(before: tuple[int, ...], *rest: Any) -> Any:
        joined.append(len(before))
        return join(before, *rest)

    monkeypatch.setattr(pooling_module, "MAX_JOINED_TOKENS", 149)
    monkeypatch.setattr(pooling_module, "scored_prompt", note)
    answer = post(stack, path, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert words in error["message"]
    assert joined == []
