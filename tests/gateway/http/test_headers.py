"""Hostile headers: too many, too long, without an end, with line breaks, of another host."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
from collections.abc import Iterator

import pytest

from cluster.config.gateway import GatewaySection
from gateway.listener.bounded_protocol import MAX_HEAD_BYTES, MAX_HEADERS
from tests.gateway.stack import WAIT_S, Stack, running_stack


def address_of(stack: Stack) -> tuple[str, int]:
    host, _, port = stack.url.removeprefix("http://").partition(":")
    return host, int(port)


def answer(stack: Stack, data: bytes) -> bytes:
    """What comes back until the server closes."""
    with socket.create_connection(address_of(stack), timeout=WAIT_S) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        received = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(65_536):
                received += piece
    return received


def get(*lines: bytes, path: bytes = b"/health") -> bytes:
    head = b"GET " + path + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    return head + b"".join(line + b"\r\n" for line in lines)


def refusal(received: bytes) -> tuple[bytes, str]:
    """Status line and error code of an answer that no application gave."""
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    assert [line for line in lines if re.fullmatch(rb"x-request-id: [0-9a-f]{32}", line)]
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return status, error["code"]


def test_headers_within_the_bounds_are_served(stack: Stack) -> None:
    lines = [b"x-%d: y" % n for n in range(MAX_HEADERS - 2)]
    assert answer(stack, get(*lines) + b"\r\n").startswith(b"HTTP/1.1 200")
    long = b"x: " + b"y" * (MAX_HEAD_BYTES - 100)
    assert answer(stack, get(long) + b"\r\n").startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "data",
    [
        get(b"x: " + b"y" * MAX_HEAD_BYTES) + b"\r\n",
        get(b"x: " + b"y" * 50_000_000),
        get(*[b"x: y"] * MAX_HEADERS) + b"\r\n",
        get(*[b"x: y"] * 2_000_000),
        get(b"x" * 1_000_000),
        get(path=b"/" + b"a" * 1_000_000) + b"\r\n",
        get() + b"\r\n" + get(b"x: " + b"y" * 1_000_000),
    ],
    ids=["long", "endless", "many", "endlessly many", "a name", "a path", "the second request"],
)
def test_headers_beyond_the_bounds_are_refused(stack: Stack, data: bytes) -> None:
    received = answer(stack, data)
    is_cut_off = not received and len(data) > 100_000  # while it was still sending
    is_first = received.startswith(b"HTTP/1.1 200")  # of two, after which it is closed
    if not (is_cut_off or is_first):
        assert refusal(received) == (
            b"HTTP/1.1 431 Request Header Fields Too Large",
            "request_too_large",
        )
    assert stack.http.get("/health").status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n",
        b"SING /health HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /health HTTP/3.7\r\nhost: x\r\n\r\n",
        get(b"content-length: x") + b"\r\n",
        get(b"transfer-encoding: chunked") + b"\r\nzz\r\n",
        get(b"transfer-encoding: chunked", b"content-length: 5") + b"\r\n0\r\n\r\n",
    ],
    ids=["TLS", "method", "version", "length", "chunk", "two lengths"],
)
def test_what_is_no_http_gets_the_error_object(stack: Stack, data: bytes) -> None:
    assert refusal(answer(stack, data)) == (b"HTTP/1.1 400 Bad Request", "invalid_value")
    assert stack.http.get("/health").status_code == 200


def test_many_requests_on_one_connection_are_counted_one_by_one(stack: Stack) -> None:
    connection = http.client.HTTPConnection(*address_of(stack), timeout=WAIT_S)
    with contextlib.closing(connection):
        for body in ("x" * 30_000, "y"):
            for _ in range(10):
                headers = {"x-padding": "p" * 4000, "content-type": "application/json"}
                given = json.dumps({"prompt": body, "max_tokens": 1})
                connection.request("POST", "/tokenize", given, headers)
                reply = connection.getresponse()
                assert reply.status == 200, reply.read()
                reply.read()


@pytest.mark.parametrize(
    "line",
    [
        b"x-request-id: a\r\nset-cookie: stolen=1",
        b"x-request-id: a\rset-cookie: stolen=1",
        b"x-request-id: a\nset-cookie: stolen=1",
        b"x-request-id: a%0d%0aset-cookie: stolen=1",
        b"traceparent: a\x00\x01",
        b"authorization: Bearer \xff\xfe\r\n set-cookie: stolen=1",
    ],
)
def test_nothing_of_a_request_becomes_a_header_of_the_answer(stack: Stack, line: bytes) -> None:
    received = answer(stack, get(line, path=b"/v1/models") + b"\r\n")
    head = received.partition(b"\r\n\r\n")[0].lower()
    assert received.startswith((b"HTTP/1.1 200", b"HTTP/1.1 400"))
    assert b"set-cookie" not in head
    assert b"stolen" not in head


@pytest.mark.parametrize(
    "host",
    ["x/health?", "x/health#", "health", "/health", "x@/health", "x\\health", "[::1]/ready", ""],
)
def test_another_host_opens_no_path(host: str, keyed: Stack) -> None:
    connection = http.client.HTTPConnection(*address_of(keyed), timeout=WAIT_S)
    with contextlib.closing(connection):
        for path in ("/v1/models", "/v1/models/../health"):
            connection.putrequest("GET", path, skip_host=True)
            connection.putheader("Host", host)
            connection.putheader("X-Forwarded-Prefix", "/v1/models")
            connection.putheader("X-Original-Url", "/health")
            connection.endheaders()
            reply = connection.getresponse()
            reply.read()
            assert reply.status in (400, 401), (host, path)


@pytest.fixture(scope="module")
def keyed() -> Iterator[Stack]:
    with running_stack(GatewaySection(api_keys=("secret",))) as stack:
        yield stack
