"""Requests that a client sends before it has its answers: few wait, and the others are not read."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from starlette.types import Receive, Scope, Send

from cluster.config.gateway import GatewaySection
from gateway.listener import timed_protocol
from gateway.listener.bounded_protocol import MAX_HEAD_BYTES, MAX_WAITING, BoundedHttpProtocol
from tests.gateway.stack import WAIT_S, running_stack, start_http
from tests.harness.certificates import Certificates

READ_BYTES = 256 * 1024
"""What asyncio reads at a time."""
SMALL = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
NUM_ANSWERS = 200


def head(num_bytes: int) -> bytes:
    """A request of about this size."""
    return b"GET /health HTTP/1.1\r\nhost: x\r\nx-more: " + b"x" * num_bytes + b"\r\n\r\n"


@pytest.fixture
def protocols(monkeypatch: pytest.MonkeyPatch) -> list[BoundedHttpProtocol]:
    """Those of all connections."""
    found: list[BoundedHttpProtocol] = []
    made = BoundedHttpProtocol.connection_made

    def connection_made(protocol: BoundedHttpProtocol, transport: asyncio.Transport) -> None:
        found.append(protocol)
        made(protocol, transport)

    monkeypatch.setattr(BoundedHttpProtocol, "connection_made", connection_made)
    return found


class Answers:
    """An application that notes how many requests wait behind the one that it answers."""

    def __init__(self, protocols: list[BoundedHttpProtocol]) -> None:
        self.protocols = protocols
        self.num_calls = 0
        self.max_waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.num_calls += 1
        await receive()
        self.max_waiting = max(self.max_waiting, len(self.protocols[-1].pipeline))
        headers = [(b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


@contextlib.asynccontextmanager
async def connected(
    app: Answers,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    url, stop = await start_http(app)
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        await stop()


async def limit_heads(
    protocols: list[BoundedHttpProtocol], monkeypatch: pytest.MonkeyPatch, limit_s: float
) -> None:
    """The limit of all heads but the first, which a machine that stands still may keep."""
    while not protocols:
        await asyncio.sleep(0)
    monkeypatch.setattr(timed_protocol, "HEAD_LIMIT_S", limit_s)


async def send_without_end(writer: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        while True:
            writer.write(data)
            await writer.drain()


async def count_answers(reader: asyncio.StreamReader, num_answers: int) -> None:
    for _ in range(num_answers):
        found = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WAIT_S)
        assert found.startswith(b"HTTP/1.1 200")


def test_no_more_is_read_while_requests_wait(protocols: list[BoundedHttpProtocol]) -> None:
    """uvicorn reads on after each answer, which kept all that a client sent in memory."""

    async def work() -> None:
        app, size = Answers(protocols), 8 * 1024
        async with connected(app) as (reader, writer):
            sender = asyncio.create_task(send_without_end(writer, head(size) * 32))
            await count_answers(reader, NUM_ANSWERS)
            sender.cancel()
        assert 0 < app.max_waiting <= READ_BYTES // size

    asyncio.run(work())


def test_few_requests_wait_and_none_is_lost(protocols: list[BoundedHttpProtocol]) -> None:
    async def work() -> None:
        app = Answers(protocols)
        async with connected(app) as (reader, writer):
            for _ in range(3):
                writer.write(SMALL * MAX_WAITING)
                await count_answers(reader, MAX_WAITING)
        assert app.num_calls == 3 * MAX_WAITING

    asyncio.run(work())


def test_a_slow_answer_to_the_last_waiting_request_has_no_limit(
    protocols: list[BoundedHttpProtocol], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is idle after the last answer only."""
    monkeypatch.setattr(timed_protocol, "IDLE_LIMIT_S", 0.2)

    class Slow(Answers):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            if self.num_calls == 1:
                await asyncio.sleep(0.6)
            await super().__call__(scope, receive, send)

    async def work() -> None:
        async with connected(Slow(protocols)) as (reader, writer):
            writer.write(SMALL * 2)
            await count_answers(reader, 2)
            assert await asyncio.wait_for(reader.read(), WAIT_S) == b"", "idle for too long"

    asyncio.run(work())


def test_a_head_has_no_limit_while_nothing_is_read(
    protocols: list[BoundedHttpProtocol], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read may end within a head, whose rest is read after the answers to earlier requests."""

    class Slow(Answers):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            if self.num_calls == 0:
                await asyncio.sleep(0.6)
            await super().__call__(scope, receive, send)

    async def work() -> None:
        async with connected(Slow(protocols)) as (reader, writer):
            await limit_heads(protocols, monkeypatch, 0.2)
            writer.write(SMALL * 2 + SMALL[:8])
            await asyncio.sleep(0.1)
            writer.write(SMALL[8:])
            await count_answers(reader, 3)

    asyncio.run(work())


def test_more_requests_than_may_wait_are_refused(protocols: list[BoundedHttpProtocol]) -> None:
    """The parser stops at the first one too many."""

    async def work() -> None:
        app = Answers(protocols)
        async with connected(app) as (reader, writer):
            writer.write(SMALL * (4 * MAX_WAITING))
            found = await asyncio.wait_for(reader.read(), WAIT_S)
            assert f"at most {MAX_WAITING} requests may wait".encode() in found
            assert found.count(b"HTTP/1.1 400") == 1
            assert found.count(b"HTTP/1.1 200") == app.num_calls
        assert app.num_calls <= MAX_WAITING + 1

    asyncio.run(work())


@pytest.mark.parametrize(
    "wrong",
    [
        b"rubbish\r\n\r\n",
        head(MAX_HEAD_BYTES),
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nno number\r\n",
    ],
    ids=["no HTTP", "headers", "body"],
)
def test_a_refusal_follows_the_answers_to_earlier_requests(
    protocols: list[BoundedHttpProtocol], monkeypatch: pytest.MonkeyPatch, wrong: bytes
) -> None:
    """One of them has begun, and takes longer than a head may."""

    class Slow(Answers):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            self.num_calls += 1
            await receive()
            headers = [(b"content-length", b"4")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"ab", "more_body": True})
            await asyncio.sleep(0.3)
            await send({"type": "http.response.body", "body": b"cd"})

    async def work() -> None:
        app = Slow(protocols)
        async with connected(app) as (reader, writer):
            writer.write(SMALL * 2)
            begun = await asyncio.wait_for(reader.readuntil(b"\r\n\r\nab"), WAIT_S)
            monkeypatch.setattr(timed_protocol, "HEAD_LIMIT_S", 0.1)
            writer.write(wrong + SMALL)
            found = begun + await asyncio.wait_for(reader.read(), WAIT_S)
            answers = found.split(b"HTTP/1.1 ")[1:]
            assert [answer[:3] for answer in answers[:2]] == [b"200", b"200"]
            assert all(answer.endswith(b"\r\n\r\nabcd") for answer in answers[:2])
            assert [answer[:1] for answer in answers[2:]] == [b"4"]
        assert app.num_calls == 2

    asyncio.run(work())


def test_a_head_that_is_late_does_not_cut_the_answer_before_it(
    protocols: list[BoundedHttpProtocol], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(Answers):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await asyncio.sleep(0.3)
            await super().__call__(scope, receive, send)

    async def work() -> None:
        async with connected(Slow(protocols)) as (reader, writer):
            await limit_heads(protocols, monkeypatch, 0.1)
            writer.write(SMALL + SMALL[:9])
            found = await asyncio.wait_for(reader.read(), WAIT_S)
            assert [answer[:3] for answer in found.split(b"HTTP/1.1 ")[1:]] == [b"200", b"408"]

    asyncio.run(work())


def test_a_client_that_leaves_after_a_refusal_is_noticed(
    protocols: list[BoundedHttpProtocol],
) -> None:
    """The application waits for its request, while a later one is not valid."""
    has_left = asyncio.Event()

    class Waiting(Answers):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            has_left.set()

    async def work() -> None:
        async with connected(Waiting(protocols)) as (_, writer):
            chunked = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
            writer.write(SMALL + chunked + b"no number\r\n")
            await asyncio.sleep(0.1)
            writer.transport.abort()
            await asyncio.wait_for(has_left.wait(), WAIT_S)

    asyncio.run(work())


def test_a_response_that_has_begun_is_followed_by_no_refusal(
    protocols: list[BoundedHttpProtocol],
) -> None:
    """The body of its own request is not valid."""

    class Early(Answers):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            headers = [(b"content-length", b"4")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"ab", "more_body": True})
            while (await receive())["type"] != "http.disconnect":
                pass

    async def work() -> None:
        async with connected(Early(protocols)) as (reader, writer):
            writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\nab"), WAIT_S)
            writer.write(b"no number\r\n")
            assert await asyncio.wait_for(reader.read(), WAIT_S) == b""

    asyncio.run(work())


def test_no_request_behind_refused_headers_begins(protocols: list[BoundedHttpProtocol]) -> None:
    """Its client could not learn whether it was served."""

    async def work() -> None:
        app = Answers(protocols)
        async with connected(app) as (reader, writer):
            writer.write(head(MAX_HEAD_BYTES) + SMALL * 2)
            found = await asyncio.wait_for(reader.read(), WAIT_S)
            assert found.startswith(b"HTTP/1.1 431")
            assert found.count(b"HTTP/1.1") == 1
        assert app.num_calls == 0

    asyncio.run(work())


def test_requests_that_wait_over_tls(tmp_path: Path, protocols: list[BoundedHttpProtocol]) -> None:
    """An admin port with TLS bounds them without a key, too."""
    files = Certificates.make(tmp_path)
    section: GatewaySection = files.section(mutual=False)
    with running_stack(section) as stack:
        host, _, port = stack.admin.http.rpartition(":")
        plain = socket.create_connection((host, int(port)))
        context: ssl.SSLContext = files.context(with_client=False)
        with context.wrap_socket(plain, server_hostname=host) as connection:
            connection.settimeout(WAIT_S)
            connection.sendall(SMALL * (4 * MAX_WAITING))
            found = b""
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                while piece := connection.recv(65536):
                    found += piece
        assert found.count(b"HTTP/1.1 ") <= MAX_WAITING + 2
        assert len(protocols[-1].pipeline) <= MAX_WAITING
