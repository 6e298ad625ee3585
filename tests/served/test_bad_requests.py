"""Bad input against a real server: an answer that says what is wrong, and nothing else changes.

``tests/gateway`` checks every rule against a scripted engine; here each kind of bad input meets the
processes that users run, and each test ends with the same question and the same answer as before.
"""

from __future__ import annotations

import json
from typing import Any

import grpc
import httpx
import pytest

from benchmarks.harness.server import GOOD, WAIT_S, Served
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.grpc.test_grpc import failure, request_of

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("unharmed")]

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
INVALID = "invalid_request_error"
CODES = grpc.StatusCode
CONTEXT = 4096
VOCAB_SIZE = 1024
ALL_TOKENS = list(range(VOCAB_SIZE))
MANY_STOPS = [f"stop {i}" for i in range(1000)]
HOSTILE_GRAMMARS: list[tuple[str, Any]] = [
    ("regex", "(unclosed"),
    ("regex", "(" * 30_000 + ")" * 30_000),
    ("regex", "x" * 70_000),
    ("regex", "|".join(rf"\w{{1,{i * 7}}}q" for i in range(1, 2000))),
    ("json", {"allOf": [{"oneOf": [{"minimum": i}, {"type": "null"}]} for i in range(40)]}),
    ("json", '{"items":' * 40 + "{}" + "}" * 40),
    (
        "grammar",
        "start: "
        + " ".join(f"a{i}?" for i in range(2000))
        + "\n"
        + "\n".join(f'a{i}: "x" | "y" | ""' for i in range(2000)),
    ),
    ("grammar", "start: " + "(" * 20_000),
]


def check_error(
    response: httpx.Response, status: int, code: str, param: str | None, kind: str = INVALID
) -> None:
    """The error object of section 1.5 of the interface, and nothing but it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == (kind, code, param)
    assert set(error) == {"message", "type", "param", "code"}
    assert 10 < len(error["message"]) < 500
    assert "Traceback" not in error["message"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"prompt": ""}, 400, "invalid_value", "prompt"),
        ({"prompt": []}, 400, "invalid_value", "prompt"),
        ({"prompt": "word " * 20_000}, 400, "context_length_exceeded", "prompt"),
        ({"prompt": [5] * (CONTEXT + 1)}, 400, "context_length_exceeded", "prompt"),
        ({"max_tokens": CONTEXT}, 400, "context_length_exceeded", "max_tokens"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"max_tokens": -1}, 400, "invalid_value", "max_tokens"),
        ({"n": 1_000_000}, 400, "invalid_value", "n"),
        ({"model": "gpt-17"}, 404, "model_not_found", "model"),
        ({"prompt": 5}, 400, "invalid_value", "prompt"),
        ({"temperature": "hot"}, 400, "invalid_value", "temperature"),
        ({"max_tokens": "5"}, 400, "invalid_value", "max_tokens"),
        ({"prompt": [VOCAB_SIZE]}, 400, "invalid_value", "prompt"),
        ({"prompt": [[5], [-1]]}, 400, "invalid_value", "prompt"),
        ({"temperature": float("nan")}, 400, "invalid_value", "temperature"),
        ({"stop": MANY_STOPS}, 400, "invalid_value", "stop"),
        ({"prompt": "x" * 10_000_000}, 413, "request_too_large", None),
        ({"min_tokens": 1, "stop_token_ids": ALL_TOKENS}, 400, "invalid_value", "stop_token_ids"),
        ({"best_of": 4, "n": 5}, 400, "invalid_value", "best_of"),
        ({"guided_regex": "a"}, 400, "unsupported_parameter", "guided_regex"),
        ({"allowed_token_ids": []}, 400, "invalid_value", "allowed_token_ids"),
        ({"bad_words": [""]}, 400, "invalid_value", "bad_words"),
        ({"prompt_logprobs": 21}, 400, "invalid_value", "prompt_logprobs"),
    ],
)
def test_requests_over_http(
    server: Served, fields: dict[str, Any], status: int, code: str, param: str | None, stream: bool
) -> None:
    raw = json.dumps({**GOOD, **fields, "stream": stream})  # with NaN, which httpx refuses
    headers = {"content-type": "application/json"}
    response = server.client.post(COMPLETIONS, content=raw, headers=headers)
    check_error(response, status, code, param)


def test_hostile_grammars_beside_a_stream(server: Served, stub: InferenceStub) -> None:
    sampling = {"max_tokens": 300, "temperature": 0.0, "ignore_eos": True}
    message = request_of(text="ROMEO:", sampling_params=sampling)
    undisturbed = list(stub.Generate(message).choices[0].token_ids)
    stream = stub.GenerateStream(message)
    for kind, text in HOSTILE_GRAMMARS * 2:
        fields = {**GOOD, "structured_outputs": {kind: text}}
        response = server.client.post(COMPLETIONS, json=fields)
        if response.status_code != 200:  # one of them is only large
            check_error(response, 400, "invalid_value", f"structured_outputs.{kind}")
    assert [t for chunk in stream for t in chunk.token_ids] == undisturbed


@pytest.mark.parametrize(
    "fields",
    [
        {"structured_outputs": {"grammar": "start: /a+/ //".ljust(65_536, "x")}},
        {"bad_words": [chr(0x4E00 + i) for i in range(1024)]},
        {"logprob_token_ids": ALL_TOKENS[:128], "prompt_logprobs": 20},
        {"repetition_penalty": 1e-300, "max_tokens": 30},
        {"temperature": 1e-30},
        {"temperature": 100, "top_p": 1e-300},
        {"top_k": 2**60, "min_p": 1.0},
        {"logit_bias": {str(i): -100 for i in range(VOCAB_SIZE)}},
        {"stop_token_ids": ALL_TOKENS},
        {"seed": -(2**63), "frequency_penalty": -2, "presence_penalty": -2},
        {"prompt": ["a"] * 256, "n": 2, "max_tokens": 1},
        {"prompt": "\x00\ufffd☃", "stop": ["\x00", "x" * 256]},
    ],
)
def test_values_at_their_limits_are_served(server: Served, fields: dict[str, Any]) -> None:
    answer = server.complete(**{**GOOD, "temperature": 1, **fields})
    assert all(choice["finish_reason"] for choice in answer["choices"])


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"messages": []}, 400, "invalid_value", "messages"),
        ({"messages": "hello"}, 400, "invalid_value", "messages"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"n": 1_000_000}, 400, "invalid_value", "n"),
        ({"model": "gpt-17"}, 404, "model_not_found", "model"),
        ({"stop": MANY_STOPS}, 400, "invalid_value", "stop"),
        ({"tools": [{"type": "function"}]}, 400, "missing_required_parameter", "tools[0].function"),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            400,
            "unsupported_parameter",
            "tools",
        ),
    ],
)
def test_conversations(
    server: Served, fields: dict[str, Any], status: int, code: str, param: str
) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, **fields}
    check_error(server.client.post(CHAT, json=body), status, code, param)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"\x00\xff\xfe" * 99, b'{"prompt": "\xff"}', b"[" * 10_000]
)
def test_malformed_json(server: Served, raw: bytes) -> None:
    headers = {"content-type": "application/json"}
    for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize"):
        response = server.client.post(path, content=raw, headers=headers)
        check_error(response, 400, "json_invalid", None)


@pytest.mark.parametrize(
    "path", ["/dashboard/", "/v1", "/v1/responses/", "/v1/completions/x", "/-", "/%00"]
)
def test_unknown_paths(server: Served, path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        check_error(server.client.request(method, path), 404, "not_found", None)


@pytest.mark.parametrize(
    ("method", "path"), [("GET", COMPLETIONS), ("DELETE", CHAT), ("POST", "/cluster/v1/status")]
)
def test_unknown_methods(server: Served, method: str, path: str) -> None:
    check_error(server.client.request(method, path), 405, "method_not_allowed", None)


@pytest.mark.parametrize(
    ("fields", "sampling", "code", "reason", "field"),
    [
        ({"text": ""}, {}, CODES.INVALID_ARGUMENT, "invalid_value", "text"),
        ({"text": "w " * 9_000}, {}, CODES.INVALID_ARGUMENT, "context_length_exceeded", "text"),
        ({}, {"max_tokens": CONTEXT}, CODES.INVALID_ARGUMENT, "context_length_exceeded", None),
        ({}, {"max_tokens": 0}, CODES.INVALID_ARGUMENT, "invalid_value", "max_tokens"),
        ({}, {"max_tokens": -1}, CODES.INVALID_ARGUMENT, "invalid_value", "max_tokens"),
        ({}, {"n": 1_000_000}, CODES.INVALID_ARGUMENT, "invalid_value", "n"),
        ({"model": "gpt-17"}, {}, CODES.NOT_FOUND, "model_not_found", "model"),
        (
            {"token_ids": {"ids": [VOCAB_SIZE]}},
            {},
            CODES.INVALID_ARGUMENT,
            "invalid_value",
            "token_ids",
        ),
        ({}, {"temperature": "NaN"}, CODES.INVALID_ARGUMENT, "invalid_value", "temperature"),
        ({}, {"stop": MANY_STOPS}, CODES.INVALID_ARGUMENT, "invalid_value", "stop"),
        ({"text": "x" * 10_000_000}, {}, CODES.INVALID_ARGUMENT, "context_length_exceeded", None),
    ],
)
def test_requests_over_grpc(
    stub: InferenceStub,
    fields: dict[str, Any],
    sampling: dict[str, Any],
    code: grpc.StatusCode,
    reason: str,
    field: str | None,
) -> None:
    given = {} if "token_ids" in fields else {"text": "ROMEO:"}
    message = request_of(**{**given, **fields}, sampling_params=sampling)
    for call in (stub.Generate, lambda message: list(stub.GenerateStream(message))):
        got, text, details = failure(lambda call=call: call(message))
        assert (got, details["ErrorInfo"].reason) == (code, reason)
        assert 10 < len(text) < 500
        violations = details["BadRequest"].field_violations
        assert field is None or violations[0].field == field


@pytest.mark.parametrize(
    "method", ["Generate", "GenerateStream", "Tokenize", "Detokenize", "GetModelInfo"]
)
def test_messages_that_cannot_be_decoded(server: Served, method: str) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        call: Any = channel.unary_stream(f"/expertmesh.v1.Inference/{method}", bytes, bytes)
        code, _, details = failure(lambda: list(call(b"\xff" * 999, timeout=WAIT_S)))
    assert code is CODES.INVALID_ARGUMENT
    assert details["ErrorInfo"].reason == "invalid_value"


def test_grpc_calls_that_are_none(server: Served, stub: InferenceStub) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        for path in ("/expertmesh.v1.Inference/Nothing", "/nothing/at.all"):
            call: Any = channel.unary_unary(path, bytes, bytes)
            with pytest.raises(grpc.RpcError) as caught:
                call(b"\xff" * 999, timeout=WAIT_S)
            unknown: Any = caught.value
            assert unknown.code() is CODES.UNIMPLEMENTED
    with pytest.raises(grpc.RpcError) as too_large:
        stub.Generate(pb.GenerateRequest(text="x" * 17_000_000), timeout=WAIT_S)
    refused: Any = too_large.value
    assert refused.code() is CODES.RESOURCE_EXHAUSTED
