"""Connections to the admin port that send nothing, or little: they end, and keep no call out."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cluster.config.gateway import GatewaySection
from gateway.core.tuning import GatewayTuning
from gateway.listener import timed_protocol
from gateway.listener.http_listener import HttpListener
from tests.gateway.stack import WAIT_S, Stack, running_stack
from tests.harness.certificates import Certificates

SHORT_S = 0.3
HEAD = b"GET /health HTTP/1.1\r\nhost: x\r\n"
POST = b"POST /admin/v1/rebalance HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
BODY = POST + b"content-length: 1000\r\n\r\n{"
KEYED_BODY = BODY.replace(b"host: x", b"host: x\r\nauthorization: Bearer root")
REFUSED = b"GET /admin/v1/operations HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    """An admin port with short limits, which serves after a test as before."""
    for name in ("HEAD_LIMIT_S", "BODY_LIMIT_S", "IDLE_LIMIT_S"):
        monkeypatch.setattr(timed_protocol, name, SHORT_S)
    section = GatewaySection(admin_keys=("root",), request_timeout_s=WAIT_S)
    with running_stack(section, tuning=GatewayTuning(body_timeout_s=WAIT_S)) as stack:
        yield stack
        check_served(stack)


def check_served(stack: Stack) -> None:
    headers = {"authorization": "Bearer root"}
    url = f"http://{stack.admin.http}/admin/v1/operations"
    assert httpx.get(url, headers=headers, timeout=WAIT_S).status_code == 200


def connect(stack: Stack) -> socket.socket:
    host, _, port = stack.admin.http.rpartition(":")
    connection = socket.create_connection((host, int(port)))
    connection.settimeout(WAIT_S)
    return connection


def received(connection: socket.socket) -> bytes:
    """All until the server closes the connection."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(4096):
            data += piece
    return data


@contextlib.contextmanager
def trickling(connection: socket.socket, data: bytes) -> Iterator[None]:
    """Send a byte at a time, again and again, in less time than any limit."""
    is_over = threading.Event()

    def send() -> None:
        with contextlib.suppress(OSError):
            while True:
                for byte in data:
                    if is_over.wait(SHORT_S / 20):
                        return
                    connection.sendall(bytes((byte,)))

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        is_over.set()
        sender.join()


@pytest.mark.parametrize(
    ("opening", "trickle", "answer"),
    [
        (b"", b"", b""),
        (b"", b"\r\n", b""),
        (HEAD, b"", b"408 Request Timeout"),
        (HEAD, b"x-more: x\r\n", b"408 Request Timeout"),
        (HEAD + b"\r\n", b"", b"200 OK"),
        (HEAD + b"\r\n", b"\r\n", b"200 OK"),
        (HEAD + b"\r\n" + HEAD, b"x-more: x\r\n", b"200 OK"),
        (BODY, b"x", b"401 Unauthorized"),
        (REFUSED, b"x", b"401 Unauthorized"),
    ],
    ids=[
        *("silent", "empty lines", "half a head", "slow head", "idle", "idle with empty lines"),
        *("second slow head", "slow body", "body of a refused request"),
    ],
)
def test_a_connection_without_a_whole_request_ends(
    quick: Stack, opening: bytes, trickle: bytes, answer: bytes
) -> None:
    with connect(quick) as connection:
        connection.sendall(opening)
        with trickling(connection, trickle) if trickle else contextlib.nullcontext():
            found = received(connection)
    if b"x-more" not in trickle:  # a reset can overtake an answer
        assert answer in found
    assert not found or answer


def test_silent_connections_keep_no_call_out(quick: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of too many the oldest ends, and one that is used does not."""
    for name in ("HEAD_LIMIT_S", "IDLE_LIMIT_S"):
        monkeypatch.setattr(timed_protocol, name, WAIT_S)
    monkeypatch.setattr(admin_http(quick), "max_connections", 20)
    with contextlib.ExitStack() as opened:
        silent = [opened.enter_context(connect(quick)) for _ in range(50)]
        check_served(quick)
        for connection in silent[:31]:  # one more for each that came, and for the call
            assert received(connection) == b""
        last = silent[-1]
        last.sendall(HEAD + b"\r\n")
        assert last.recv(4096).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize(
    "sent",
    [
        KEYED_BODY,
        b"GET /dashboard/static/uplot/uPlot.iife.min.js HTTP/1.1\r\nhost: x\r\n\r\n" * 200,
    ],
    ids=["half a body", "answers that are not read"],
)
def test_connections_that_wait_for_their_client_keep_no_call_out(
    quick: Stack, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    for name in ("HEAD_LIMIT_S", "BODY_LIMIT_S", "IDLE_LIMIT_S"):
        monkeypatch.setattr(timed_protocol, name, WAIT_S)
    monkeypatch.setattr(admin_http(quick), "max_connections", 8)
    with contextlib.ExitStack() as opened:
        for _ in range(8):
            connection = opened.enter_context(connect(quick))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(sent)
        quick.wait_for(lambda: num_served(quick) == 8, "work on a request of each connection")
        for _ in range(3):
            check_served(quick)


def num_served(stack: Stack) -> int:
    """Connections of the admin port with a request that the application works on."""
    return sum(one.is_serving for one in admin_http(stack).connections)


def admin_http(stack: Stack) -> HttpListener:
    return next(one for one in stack.admin._servers if isinstance(one, HttpListener))


def test_a_slow_answer_has_no_limit(quick: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of the application is not that of its client."""
    is_asked, goes_on = threading.Event(), threading.Event()

    async def operations() -> list[object]:
        is_asked.set()
        while not goes_on.is_set():
            await asyncio.sleep(0.01)
        return []

    monkeypatch.setattr(quick.controller, "operations", operations)
    with connect(quick) as connection:
        head = b"GET /admin/v1/operations HTTP/1.1\r\nhost: x\r\nauthorization: Bearer root\r\n\r\n"
        connection.sendall(head)
        assert is_asked.wait(WAIT_S)
        with connect(quick) as other:  # it ends after the limit
            assert received(other) == b""
        goes_on.set()
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 OK")


def test_a_tls_handshake_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.listener.http_listener.HEAD_LIMIT_S", SHORT_S)
    files = Certificates.make(tmp_path)
    with running_stack(files.section(mutual=False)) as stack, connect(stack) as connection:
        assert received(connection) == b""
        url = f"https://{stack.admin.http}/health"
        assert (
            httpx.get(url, verify=files.context(with_client=False), timeout=WAIT_S).status_code
            == 200
        )
