"""Bad input over HTTP: a specific error object each time, and the server goes on serving."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from cluster.config.gateway import GatewaySection
from gateway.core.tuning import GatewayTuning
from gateway.http.parse import parse_body
from gateway.http.schema import CallBody
from tests.gateway.fakes import EOS_ID, MAX_MODEL_LEN, VOCAB_SIZE
from tests.gateway.http.test_convert import NEUTRAL, UNBUILT
from tests.gateway.stack import MODEL, WAIT_S, Stack, complete, post, running_stack

pytestmark = pytest.mark.heavy

INVALID = "invalid_request_error"
COMPLETIONS = "/v1/completions"


@pytest.fixture(autouse=True)
def _goes_on_serving(stack: Stack) -> Iterator[None]:
    """After each test: only good requests have reached the engine, and it still serves."""
    yield
    for task in stack.engine.running:
        raise AssertionError(f"{task} was left running")
    assert complete(stack, prompt="hello", max_tokens=1)["usage"]["completion_tokens"] == 1


def _check(response: httpx.Response, status: int, code: str, param: str | None) -> str:
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"], error["param"]) == (INVALID, code, param)
    message: str = error["message"]
    assert message
    return message


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": [[]]}, "prompt", "invalid_value"),
        ({"prompt": ["a", ""]}, "prompt", "invalid_value"),
        ({}, "prompt", "missing_required_parameter"),
        ({"prompt": None}, "prompt", "invalid_value"),
        ({"prompt": 5}, "prompt", "invalid_value"),
        ({"prompt": {"a": 1}}, "prompt", "invalid_value"),
        ({"prompt": [1, "a"]}, "prompt", "invalid_value"),
        ({"prompt": [1, True]}, "prompt", "invalid_value"),
        ({"prompt": [1.5]}, "prompt", "invalid_value"),
        ({"prompt": [VOCAB_SIZE]}, "prompt", "invalid_value"),
        ({"prompt": [-1]}, "prompt", "invalid_value"),
        ({"prompt": [10**30]}, "prompt", "invalid_value"),
        ({"max_tokens": 10**4300 - 1}, "max_tokens", "invalid_value"),
        ({"min_tokens": 10**4300 - 1}, "min_tokens", "invalid_value"),
        ({"prompt": ["a"] * 300}, "prompt", "invalid_value"),
        ({"prompt": [1] * (MAX_MODEL_LEN + 1)}, "prompt", "context_length_exceeded"),
        ({"prompt": "x" * 2000}, "prompt", "context_length_exceeded"),
        ({"prompt": "x" * 1_000_000}, "prompt", "context_length_exceeded"),
        ({"max_tokens": MAX_MODEL_LEN}, "max_tokens", "context_length_exceeded"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"max_tokens": "5"}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 1_000_000}, "n", "invalid_value"),
        ({"n": 16, "prompt": ["a"] * 33}, "n", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"temperature": True}, "temperature", "invalid_value"),
        ({"stop": ["x"] * 1000}, "stop", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": [1]}, "stop", "invalid_value"),
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"x": "1"}}, "logit_bias.x", "invalid_value"),
        ({"logit_bias": {"x" * 1_000_000: "1"}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "invalid_value"),
        ({"logprobs": 21}, "logprobs", "invalid_value"),
        ({"logprobs": True}, "logprobs", "invalid_value"),
        ({"logprobs": 2, "logprob_token_ids": [1]}, "logprob_token_ids", "invalid_value"),
        ({"logprob_token_ids": [1], "echo": True}, "logprob_token_ids", "invalid_value"),
        ({"logprob_token_ids": [1, 1]}, "logprob_token_ids", "invalid_value"),
        ({"logprob_token_ids": [VOCAB_SIZE]}, "logprob_token_ids", "invalid_value"),
        ({"logprob_token_ids": [-1]}, "logprob_token_ids", "invalid_value"),
        ({"logprob_token_ids": list(range(129))}, "logprob_token_ids", "invalid_value"),
        ({"logprob_token_ids": 5}, "logprob_token_ids", "invalid_value"),
        ({"logprob_token_ids": [1.5]}, "logprob_token_ids[0]", "invalid_value"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "invalid_value"),
        ({"prompt_logprobs": -1}, "prompt_logprobs", "invalid_value"),
        ({"prompt_logprobs": True}, "prompt_logprobs", "invalid_value"),
        ({"prompt_logprobs": "1"}, "prompt_logprobs", "invalid_value"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "invalid_value"),
        ({"allowed_token_ids": [VOCAB_SIZE]}, "allowed_token_ids", "invalid_value"),
        ({"allowed_token_ids": [1] * (VOCAB_SIZE + 1)}, "allowed_token_ids", "invalid_value"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids", "invalid_value"),
        ({"allowed_token_ids": [True]}, "allowed_token_ids[0]", "invalid_value"),
        ({"allowed_token_ids": "all"}, "allowed_token_ids", "invalid_value"),
        ({"allowed_token_ids": {"1": 2}}, "allowed_token_ids", "invalid_value"),
        (
            {"allowed_token_ids": [EOS_ID], "min_tokens": 1},
            "allowed_token_ids",
            "invalid_value",
        ),
        ({"bad_words": "word"}, "bad_words", "invalid_value"),
        ({"bad_words": [5]}, "bad_words[0]", "invalid_value"),
        ({"bad_words": ["a", ""]}, "bad_words", "invalid_value"),
        ({"bad_words": ["x" * 257]}, "bad_words", "invalid_value"),
        ({"bad_words": ["x"] * 1025}, "bad_words", "invalid_value"),
        ({"return_tokens_as_token_ids": 1}, "return_tokens_as_token_ids", "invalid_value"),
        ({"response_format": []}, "response_format", "invalid_value"),
        ({"response_format": {"type": 5}}, "response_format.type", "invalid_value"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"structured_outputs": "json"}, "structured_outputs", "invalid_value"),
        ({"structured_outputs": {"regex": ["a"]}}, "structured_outputs.regex", "invalid_value"),
        (
            {"structured_outputs": {"regex": "a" * 70_000}},
            "structured_outputs.regex",
            "invalid_value",
        ),
        (
            {"structured_outputs": {"choice": [""] * 40_000}},
            "structured_outputs.choice",
            "invalid_value",
        ),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"seed": 2**64}, "seed", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ],
)
def test_bad_values(stack: Stack, fields: dict[str, Any], param: str, code: str) -> None:
    body = fields if "prompt" in fields or fields == {} else {"prompt": "hello", **fields}
    response = post(stack, COMPLETIONS, **body)
    message = _check(response, 400, code, param)
    assert param in message or code == "context_length_exceeded"
    if code == "context_length_exceeded":
        assert "maximum context length" in message
    assert not stack.engine.requests


@pytest.mark.parametrize("name", UNBUILT)
def test_unbuilt_fields(stack: Stack, name: str) -> None:
    for path, extra in (
        (COMPLETIONS, {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        response = post(stack, path, **extra, **{name: UNBUILT[name]})
        _check(response, 400, "unsupported_parameter", name)


def test_all_neutral_values_together(stack: Stack) -> None:
    messages = [{"role": "user", "content": "x"}]
    response = post(stack, "/v1/chat/completions", messages=messages, max_tokens=1, **NEUTRAL)
    assert response.status_code == 200, response.text
    nothing = dict.fromkeys(UNBUILT)
    assert complete(stack, prompt="x", max_tokens=1, stop=None, logprobs=None, **nothing)


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/chat/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[1]",
        b'"x"',
        b"null",
        b"\x00\xff\xfe",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xed\xa0\x80"}',
        '{"prompt": "\\ud800"}'.encode("utf-16"),
        b"[" * 100_000,
    ],
)
def test_malformed_bodies(stack: Stack, path: str, raw: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = stack.http.post(path, content=raw, headers=headers, timeout=WAIT_S)
    _check(response, 400, "json_invalid", None)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_temperatures_that_are_no_numbers(stack: Stack, literal: str) -> None:
    raw = f'{{"prompt": "x", "temperature": {literal}}}'.encode()
    headers = {"content-type": "application/json"}
    response = stack.http.post(COMPLETIONS, content=raw, headers=headers)
    assert "temperature" in _check(response, 400, "invalid_value", "temperature")


def test_deep_bodies(stack: Stack) -> None:
    deep: Any = "x"
    for _ in range(100):
        deep = [deep]
    response = post(stack, COMPLETIONS, prompt="x", metadata=deep)
    assert "64" in _check(response, 400, "json_invalid", None)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded"])
def test_other_content_types(stack: Stack, kind: str) -> None:
    raw = json.dumps({"prompt": "x"}).encode()
    response = stack.http.post(COMPLETIONS, content=raw, headers={"content-type": kind})
    assert kind in _check(response, 400, "invalid_value", "content-type")


@pytest.mark.parametrize("kind", ["Application/JSON", "application/vnd.api+JSON; charset=UTF-8"])
def test_content_types_in_any_case(stack: Stack, kind: str) -> None:
    raw = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    response = stack.http.post(COMPLETIONS, content=raw, headers={"content-type": kind})
    assert response.status_code == 200, response.text


def test_whole_numbers_in_any_spelling(stack: Stack) -> None:
    """``5.0`` is an integer in JSON Schema, and in what some clients write."""
    raw = (
        b'{"prompt": "x", "max_tokens": 2.0, "n": 3e0, "seed": -1.0, "top_k": 5.0, "logprobs": 1.0}'
    )
    headers = {"content-type": "application/json"}
    choices = stack.http.post(COMPLETIONS, content=raw, headers=headers).json()["choices"]
    assert len(choices) == 3
    assert {len(choice["logprobs"]["tokens"]) for choice in choices} == {2}
    assert parse_body(CallBody, {"priority": -3.0}).priority == -3


def test_a_compressed_body_is_refused_by_name(stack: Stack) -> None:
    raw = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    response = stack.http.post(COMPLETIONS, content=gzip.compress(raw), headers=headers)
    message = _check(response, 400, "unsupported_parameter", "content-encoding")
    assert "'gzip'" in message
    plain = headers | {"content-encoding": "identity"}
    assert stack.http.post(COMPLETIONS, content=raw, headers=plain).status_code == 200


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_any_unicode_is_read(stack: Stack, encoding: str) -> None:
    raw = json.dumps({"prompt": "x", "max_tokens": 1}).encode(encoding)
    headers = {"content-type": "application/json"}
    assert stack.http.post(COMPLETIONS, content=raw, headers=headers).status_code == 200


def test_a_body_of_10_mb(stack: Stack) -> None:
    response = post(stack, COMPLETIONS, prompt="x" * 10_000_000)
    assert "8388608" in _check(response, 413, "request_too_large", None)


def test_a_large_body_without_a_length(stack: Stack) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(100):
            yield b"x" * 100_000
        yield b'"}'

    headers = {"content-type": "application/json"}
    response = stack.http.post(COMPLETIONS, content=chunks(), headers=headers, timeout=WAIT_S)
    _check(response, 413, "request_too_large", None)


def _announce(stack: Stack, *lines: str, body: bytes = b"", length: int = 9_000_000) -> bytes:
    """What comes back until the server closes, for a body that is announced and does not come."""
    parts = urlsplit(stack.url)
    head = (
        f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        + "".join(f"{line}\r\n" for line in (f"content-length: {length}", *lines))
    )
    address = (parts.hostname or "", parts.port or 0)
    with socket.create_connection(address, timeout=WAIT_S) as connection:
        connection.sendall(head.encode() + b"\r\n" + body)
        received = b""
        while piece := connection.recv(65_536):
            received += piece
    return received


def test_a_waiting_client_is_not_asked_for_too_much(stack: Stack) -> None:
    received = _announce(stack, "expect: 100-continue")
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in head
    assert json.loads(body)["error"]["code"] == "request_too_large"


@pytest.fixture(scope="module")
def hasty() -> Iterator[Stack]:
    """A gateway that waits for no body."""
    with running_stack(tuning=GatewayTuning(body_timeout_s=0.02, drain_pause_s=0.02)) as stack:
        yield stack


@pytest.mark.parametrize("body", [b"", b"{"])
def test_a_large_body_that_stops_is_too_large_not_late(hasty: Stack, body: bytes) -> None:
    received = _announce(hasty, body=body)
    assert received.startswith(b"HTTP/1.1 413")
    assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_too_large"


def test_a_body_that_stops_is_late(hasty: Stack) -> None:
    received = _announce(hasty, "connection: close", body=b"{", length=9)
    assert received.startswith(b"HTTP/1.1 408")


def test_unknown_models(stack: Stack) -> None:
    for path, extra in ((COMPLETIONS, {"prompt": "x"}), ("/tokenize", {"prompt": "x"})):
        response = post(stack, path, model="gpt-17", **extra)
        assert "gpt-17" in _check(response, 404, "model_not_found", "model")
    _check(stack.http.get("/v1/models/org/gpt-17"), 404, "model_not_found", "model")
    assert stack.http.get(f"/v1/models/{MODEL}").status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/dashboard/", "/v1", "/v1/responses/", "/v1/completions/", "/docs", "/%ff"],
)
def test_unknown_paths(stack: Stack, path: str) -> None:
    for response in (stack.http.get(path), post(stack, path)):
        _check(response, 404, "not_found", None)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", COMPLETIONS),
        ("PUT", "/v1/chat/completions"),
        ("POST", "/v1/models"),
        ("GET", "/v1/responses"),
        ("POST", "/v1/responses/resp_1"),
    ],
)
def test_unknown_methods(stack: Stack, method: str, path: str) -> None:
    response = stack.http.request(method, path)
    _check(response, 405, "method_not_allowed", None)
    assert response.headers["allow"]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {"prompt": "x", "messages": []}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens"),
    ],
)
def test_bad_tokenize_bodies(stack: Stack, path: str, fields: Any, param: str) -> None:
    response = post(stack, path, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_one_field_of_two(stack: Stack) -> None:
    response = post(stack, "/tokenize")
    _check(response, 400, "missing_required_parameter", "prompt")
    assert response.json()["error"]["message"] == "one of prompt and messages is required"
    response = post(stack, "/tokenize", prompt="x", messages=[])
    _check(response, 400, "invalid_value", "prompt")
    assert response.json()["error"]["message"] == "prompt and messages cannot be set together"


@pytest.mark.parametrize("value", ["x", "-1", "0", "1.5", "9" * 12, "9" * 20])
def test_bad_time_limits(stack: Stack, value: str) -> None:
    headers = {"x-request-timeout-ms": value}
    for path in (COMPLETIONS, "/tokenize", "/detokenize"):
        response = stack.http.post(path, json={"prompt": "x", "tokens": [5]}, headers=headers)
        reported = _check(response, 400, "invalid_value", "x-request-timeout-ms")
        assert "must be a whole number from 1 to 99999999999" in reported


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [("mine-1_2.3", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("ä", False)],
)
def test_request_ids(stack: Stack, given: str, is_kept: bool) -> None:
    for path in ("/health", "/nope"):
        response = stack.http.get(path, headers={b"x-request-id": given.encode()})
        assert (response.headers["x-request-id"] == given) is is_kept
        assert response.headers["openai-version"] == "2020-10-01"
        assert int(response.headers["openai-processing-ms"]) >= 0
        assert response.headers["x-expertmesh-placement-epoch"] == "3"


def test_rubbish_on_both_ports(stack: Stack) -> None:
    parts = urlsplit(stack.url)
    host, port = stack.grpc_target.split(":")
    for address in ((parts.hostname or "", parts.port or 0), (host, int(port))):
        for rubbish in (b"\x00\xff" * 5000, b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01" + b"a" * 99):
            with socket.create_connection(address, timeout=WAIT_S) as connection:
                connection.settimeout(1.0)
                connection.sendall(rubbish)
                try:
                    connection.recv(4096)
                except OSError:
                    continue


def test_keys_guard_all_but_the_probes() -> None:
    with running_stack(GatewaySection(api_keys=("secret",))) as stack:
        for path in ("/health", "/ready"):
            assert stack.http.get(path).status_code == 200
        for path in ("/v1/models", "/metrics", "/version", "/cluster/v1/status", "/nope"):
            response = stack.http.get(path)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            error = response.json()["error"]
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        headers = {"authorization": "Bearer secret"}
        assert stack.http.get("/v1/models", headers=headers).status_code == 200
        assert stack.http.get("/v1/models", headers={"api-key": "secret"}).status_code == 200
