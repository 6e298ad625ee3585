"""Bad input against a real server: an answer that says what is wrong, and nothing else changes.

``tests/gateway`` checks every rule against a scripted engine; here each kind of bad input meets the
processes that users run, and each test ends with the same question and the same answer as before.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.test_grpc import failure, request_of
from tests.served import WAIT_S, Address, Served, running_server

pytestmark = pytest.mark.ray

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
GOOD: dict[str, Any] = {
    "prompt": "ROMEO:",
    "max_tokens": 12,
    "temperature": 0,
    "return_token_ids": True,
}
INVALID = "invalid_request_error"
CODES = grpc.StatusCode
CONTEXT = 4096
VOCAB_SIZE = 1024
MANY_STOPS = [f"stop {i}" for i in range(1000)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with running_server(tmp_path_factory.mktemp("state")) as server:
        yield server


@pytest.fixture(scope="module")
def stub(server: Served) -> Iterator[InferenceStub]:
    with grpc.insecure_channel(server.grpc) as channel:
        yield InferenceStub(channel)


@pytest.fixture(scope="module")
def calm(server: Served) -> dict[str, Any]:
    """What the server was and said before any of it."""
    return {"answer": answer_of(server), "workers": workers_of(server)}


@pytest.fixture(autouse=True)
def _goes_on_serving(server: Served, calm: dict[str, Any]) -> Iterator[None]:
    """After each test: no block is held, no worker was lost, and the answer is the same."""
    yield
    server.wait_idle()
    assert answer_of(server) == calm["answer"]
    assert workers_of(server) == calm["workers"]


def answer_of(server: Served) -> Any:
    """The text and tokens of one good request."""
    return server.complete(**GOOD)["choices"]


def workers_of(server: Served) -> Any:
    """Generation, and who serves in it."""
    status = server.status()
    serving = [(w["name"], w["pid"], w["state"]) for w in status["workers"]]
    return status["state"], status["generation"], len(status["history"]), serving


# ---- requests that cannot be served ---------------------------------------------------------


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
        ({"best_of": 4}, 400, "unsupported_parameter", "best_of"),
    ],
)
def test_requests_over_http(
    server: Served, fields: dict[str, Any], status: int, code: str, param: str | None, stream: bool
) -> None:
    raw = json.dumps({**GOOD, **fields, "stream": stream})  # with NaN, which httpx refuses
    headers = {"content-type": "application/json"}
    response = server.client.post(COMPLETIONS, content=raw, headers=headers)
    check_error(response, status, code, param)


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"messages": []}, 400, "invalid_value", "messages"),
        ({"messages": "hello"}, 400, "invalid_value", "messages"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"n": 1_000_000}, 400, "invalid_value", "n"),
        ({"model": "gpt-17"}, 404, "model_not_found", "model"),
        ({"stop": MANY_STOPS}, 400, "invalid_value", "stop"),
        ({"tools": [{"type": "function"}]}, 400, "unsupported_parameter", "tools"),
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


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/responses", "/v1/completions/x", "/-", "/%00"])
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
        ({"text": ""}, {}, CODES.INVALID_ARGUMENT, "invalid_value", "prompt"),
        ({"text": "w " * 9_000}, {}, CODES.INVALID_ARGUMENT, "context_length_exceeded", "prompt"),
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
            "prompt",
        ),
        ({}, {"temperature": "NaN"}, CODES.INVALID_ARGUMENT, "invalid_value", "temperature"),
        ({}, {"stop": MANY_STOPS}, CODES.INVALID_ARGUMENT, "invalid_value", "stop"),
        ({"text": "x" * 10_000_000}, {}, CODES.INVALID_ARGUMENT, "context_length_exceeded", None),
        ({"priority": 1}, {}, CODES.UNIMPLEMENTED, "unsupported_parameter", "priority"),
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


# ---- rubbish on every port ------------------------------------------------------------------

_NOISE = random.Random(20).randbytes(65_536)
RUBBISH = {
    "noise": _NOISE,
    "zeros": bytes(5_000),
    "longest lengths": b"\xff" * 5_000,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + _NOISE[:500],
    "an HTTP of no version": b"GET / HTTP/9.9\r\nhost: x\r\n\r\n",
    "HTTP/2 and noise": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _NOISE[:3_000],
    "half a line": b"POST /v1/compl",
    "nothing": b"",
}


def send_rubbish(address: Address, data: bytes, says_goodbye: bool) -> None:
    """One connection, until the server ends it. Raises ``TimeoutError`` if it does not."""
    with socket.create_connection(address, timeout=WAIT_S) as connection:
        try:
            connection.sendall(data)
            if says_goodbye:
                connection.shutdown(socket.SHUT_WR)
            while connection.recv(65_536):
                pass
        except TimeoutError:
            raise
        except OSError:
            return  # closed before it had read everything


def test_rubbish_on_every_port(server: Served) -> None:
    listeners = server.listeners()
    assert len(listeners) >= 7  # HTTP, gRPC, control server, engine stream, three data planes
    for what, address in listeners.items():
        for kind, data in RUBBISH.items():
            try:
                send_rubbish(address, data, says_goodbye=kind != "noise")
            except TimeoutError:
                pytest.fail(f"{kind} on {what}: the connection stays open")


def test_a_stream_under_rubbish_and_silence_is_the_same(
    server: Served, stub: InferenceStub
) -> None:
    message = request_of(
        text="ROMEO:", sampling_params={"max_tokens": 200, "temperature": 0.0, "ignore_eos": True}
    )
    undisturbed = list(stub.Generate(message).choices[0].token_ids)
    stop = threading.Event()
    addresses = list(server.listeners().values())
    storm = threading.Thread(target=_storm, args=(addresses, stop))
    silent = [socket.create_connection(a, timeout=WAIT_S) for a in addresses for _ in range(40)]
    storm.start()
    try:
        chunks = list(stub.GenerateStream(message))
    finally:
        stop.set()
        storm.join(WAIT_S)
        for connection in silent:
            connection.close()
    assert not storm.is_alive()
    assert [t for chunk in chunks for t in chunk.token_ids] == undisturbed


def _storm(addresses: list[Address], stop: threading.Event) -> None:
    """Rubbish on all ports in turn until told to stop."""
    noise = random.Random(21)
    while not stop.is_set():
        for address in addresses:
            data = noise.randbytes(noise.randrange(1, 20_000))
            with (
                contextlib.suppress(ConnectionError),
                socket.create_connection(address, timeout=WAIT_S) as connection,
            ):
                connection.sendall(data)
