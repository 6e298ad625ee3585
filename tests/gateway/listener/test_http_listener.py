"""The HTTP port: shared by replicas without a lost connection, in front of slow applications,
behind proxies."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit

import pytest
from starlette.types import Receive, Scope, Send

from benchmarks.harness.distributed import free_ports
from cluster.config.gateway import GatewaySection
from gateway.listener import timed_protocol
from gateway.listener.http_listener import HttpListener
from gateway.listener.timed_protocol import BODY_STEP_BYTES
from tests.gateway.stack import WAIT_S, Stack, running_stack, start_http

GET = b"GET / HTTP/1.1\r\nhost: x\r\n"
NUM_CLIENTS = 10


class Named:
    """An application that answers its name, and who asks."""

    def __init__(self, name: str) -> None:
        self._name = name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.001)
        body = json.dumps([self._name, scope["client"][0], scope["scheme"]]).encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


async def ask(port: int, *lines: bytes) -> list[str]:
    """The answer over a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(GET + b"".join(line + b"\r\n" for line in (*lines, b"connection: close", b"")))
    answer = await asyncio.wait_for(reader.read(), WAIT_S)
    writer.close()
    found: list[str] = json.loads(answer.partition(b"\r\n\r\n")[2])
    return found


@contextlib.asynccontextmanager
async def sharing(port: int, *names: str) -> AsyncIterator[list[HttpListener]]:
    """Listeners of one port."""
    made = [
        HttpListener(
            Named(name),
            GatewaySection(),
            "HTTP",
            "127.0.0.1",
            port,
            max_connections=100,
            is_shared=True,
        )
        for name in names
    ]
    for listener in made:
        await listener.start()
    yield made
    await asyncio.gather(*(listener.stop() for listener in made))


def test_the_body_of_an_answer_does_not_wait_for_the_client() -> None:
    """To acknowledge the headers, which many do after 40 ms."""

    async def work() -> None:
        (port,) = free_ports(1)
        async with sharing(port, "a") as (listener,):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(GET + b"\r\n")
            assert await asyncio.wait_for(reader.readline(), WAIT_S) == b"HTTP/1.1 200 OK\r\n"
            (protocol,) = listener._server.server_state.connections
            connection = protocol.transport.get_extra_info("socket")
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            writer.close()

    asyncio.run(work())


def test_no_connection_is_lost_where_one_of_two_listeners_ends() -> None:
    async def work() -> None:
        (port,) = free_ports(1)
        answers = collections.Counter[str]()
        has_ended = asyncio.Event()

        async def client() -> None:
            while not has_ended.is_set():
                answers[(await ask(port))[0]] += 1

        async with sharing(port, "one", "two") as (one, _):
            clients = [asyncio.create_task(client()) for _ in range(NUM_CLIENTS)]
            while min(answers["one"], answers["two"]) < NUM_CLIENTS:
                await asyncio.sleep(0.01)
            await one.stop_accepting()
            assert one.is_serving
            answers.clear()
            while answers["two"] < 10 * NUM_CLIENTS:
                await asyncio.sleep(0.01)
            has_ended.set()
            await asyncio.gather(*clients)
            assert answers["one"] <= NUM_CLIENTS, "those that were open"
            await one.stop()
            assert not one.is_serving

    asyncio.run(asyncio.wait_for(work(), WAIT_S))


def test_connections_that_wait_to_be_accepted_are_served() -> None:
    """The loop has accepted none of them when the end begins."""

    async def work() -> None:
        (port,) = free_ports(1)
        async with sharing(port, "one") as (one,):
            waiting = [socket.create_connection(("127.0.0.1", port)) for _ in range(NUM_CLIENTS)]
            ending = asyncio.create_task(one.stop_accepting())
            for connection in waiting:
                connection.sendall(GET + b"\r\n")
            await ending
            for connection in waiting:
                with connection:
                    found = await asyncio.to_thread(connection.recv, 4096)
                    assert found.startswith(b"HTTP/1.1 200 OK")
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", port)

    asyncio.run(asyncio.wait_for(work(), WAIT_S))


@pytest.mark.parametrize(
    ("trusted", "expected"),
    [
        (("127.0.0.1",), ["7.7.7.7", "https"]),
        (("127.0.0.0/8",), ["7.7.7.7", "https"]),
        (("*",), ["7.7.7.7", "https"]),
        (("10.0.0.1", "::1"), ["127.0.0.1", "http"]),
        ((), ["127.0.0.1", "http"]),
    ],
)
def test_forwarded_headers_count_from_trusted_addresses(
    trusted: tuple[str, ...], expected: list[str]
) -> None:
    async def work() -> None:
        section = GatewaySection(forwarded_allow_ips=trusted)
        url, stop = await start_http(Named("one"), section)
        lines = (b"x-forwarded-for: 7.7.7.7", b"x-forwarded-proto: https")
        assert await ask(urlsplit(url).port or 0, *lines) == ["one", *expected]
        await stop()

    asyncio.run(asyncio.wait_for(work(), WAIT_S))


class Waiting:
    """An application that reads a body once it may."""

    def __init__(self) -> None:
        self.may_read = asyncio.Event()
        self.num_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.may_read.wait()
        more = True
        while more:
            message = await receive()
            self.num_bytes += len(message.get("body", b""))
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def test_nothing_is_read_while_the_application_reads_nothing() -> None:
    size = 100_000_000

    async def work() -> None:
        app = Waiting()
        url, stop = await start_http(app)
        reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
        writer.write(GET.replace(b"GET", b"POST") + b"content-length: %d\r\n\r\n" % size)
        num_sent, piece = 0, b"x" * 1_000_000
        with contextlib.suppress(TimeoutError):
            while num_sent < size:
                writer.write(piece)
                num_sent += len(piece)
                await asyncio.wait_for(writer.drain(), 0.5)
        assert num_sent < 20_000_000, "the rest waits at the client: kernels take a few megabytes"
        app.may_read.set()
        writer.write(b"x" * (size - num_sent))
        assert (await asyncio.wait_for(reader.readline(), WAIT_S)).startswith(b"HTTP/1.1 204")
        assert app.num_bytes == size
        writer.close()
        await stop()

    asyncio.run(asyncio.wait_for(work(), 2 * WAIT_S))


@pytest.mark.parametrize(
    ("piece", "answer"),
    [(BODY_STEP_BYTES, b"HTTP/1.1 204"), (10, b"")],
    ids=["it grows", "it hardly grows"],
)
def test_a_body_must_make_progress(
    monkeypatch: pytest.MonkeyPatch, piece: int, answer: bytes
) -> None:
    monkeypatch.setattr(timed_protocol, "BODY_LIMIT_S", 0.4)
    num_pieces = 10

    async def work() -> None:
        app = Waiting()
        app.may_read.set()
        url, stop = await start_http(app)
        reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
        size = num_pieces * piece
        writer.write(GET.replace(b"GET", b"POST") + b"content-length: %d\r\n\r\n" % size)
        with contextlib.suppress(ConnectionError):
            for _ in range(num_pieces):
                writer.write(b"x" * piece)
                await writer.drain()
                await asyncio.sleep(0.1)
            received = await asyncio.wait_for(reader.readline(), WAIT_S)
            assert received.startswith(answer)
            assert answer or not received
        writer.close()
        await stop()

    asyncio.run(asyncio.wait_for(work(), WAIT_S))


def test_a_connection_that_sends_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed_protocol, "HEAD_LIMIT_S", 0.2)

    async def work() -> None:
        url, stop = await start_http(Waiting())
        connected = [
            await asyncio.open_connection("127.0.0.1", urlsplit(url).port) for _ in range(50)
        ]
        for reader, writer in connected:
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), WAIT_S) == b""
            writer.close()
        await stop()

    asyncio.run(asyncio.wait_for(work(), WAIT_S))


class Lasting(Waiting):
    """An application that keeps the scope of its request."""

    scope: Scope

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        await super().__call__(scope, receive, send)


UPGRADE = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"


@pytest.mark.parametrize(
    ("framing", "body"),
    [
        (b"content-length: 5\r\n\r\n", b"hello"),
        (b"transfer-encoding: chunked\r\n\r\n", b"5\r\nhello\r\n0\r\n\r\n"),
    ],
    ids=["length", "chunked"],
)
@pytest.mark.parametrize("is_split", [False, True], ids=["whole", "split"])
def test_an_offer_to_upgrade_is_ignored(framing: bytes, body: bytes, is_split: bool) -> None:
    """Java's client makes one with each request; uvicorn lost the body."""

    async def work() -> None:
        app = Lasting()
        app.may_read.set()
        url, stop = await start_http(app)
        reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
        head = GET.replace(b"GET", b"POST") + UPGRADE + framing
        for num_requests in range(1, 4):
            for piece in (head, body) if is_split else (head + body,):
                writer.write(piece)
                await asyncio.sleep(0.05)
            assert await status_line(reader) == b"HTTP/1.1 204 No Content"
            assert app.num_bytes == 5 * num_requests
        assert (app.scope["method"], app.scope["path"]) == ("POST", "/")
        assert b"upgrade" not in dict(app.scope["headers"])
        writer.write((GET + UPGRADE + b"\r\n") * 3)  # pipelined
        writer.write(GET.replace(b"GET /", b"CONNECT http://x/") + UPGRADE + b"\r\n")
        for _ in range(4):
            assert await status_line(reader) == b"HTTP/1.1 204 No Content"
        assert app.scope["method"] == "CONNECT"
        writer.close()
        await stop()

    asyncio.run(asyncio.wait_for(work(), WAIT_S))


async def status_line(reader: asyncio.StreamReader) -> bytes:
    """The first line of the next answer, which has no body."""
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WAIT_S)
    return answer.partition(b"\r\n")[0]


CHUNKED = GET.replace(b"GET", b"POST") + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n"


def test_trailers_are_read_and_are_no_headers() -> None:
    async def work() -> None:
        app = Lasting()
        app.may_read.set()
        url, stop = await start_http(app)
        reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
        writer.write(CHUNKED)
        writer.write(b"x-digest: 1\r\n\r\n")
        assert (await asyncio.wait_for(reader.readline(), WAIT_S)).startswith(b"HTTP/1.1 204")
        assert app.num_bytes == 5
        assert [name for name, _ in app.scope["headers"]] == [b"host", b"transfer-encoding"]
        writer.close()
        await stop()

    asyncio.run(asyncio.wait_for(work(), WAIT_S))


@pytest.mark.parametrize("piece", [b"a:\r\n", b"a"], ids=["many", "one long"])
def test_endless_trailers_end_the_connection(piece: bytes) -> None:
    """uvicorn keeps all of them: 20 MB of short ones took 600 MiB."""

    async def work() -> None:
        app = Lasting()
        app.may_read.set()
        url, stop = await start_http(app)
        _, writer = await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
        writer.write(CHUNKED)
        pieces = piece * 10_000
        with contextlib.suppress(ConnectionError):
            for _ in range(500):
                writer.write(pieces)
                await writer.drain()
        assert writer.is_closing(), "the server has ended the connection"
        assert len(app.scope["headers"]) == 2
        writer.close()
        await stop()

    asyncio.run(asyncio.wait_for(work(), WAIT_S))


@pytest.fixture(scope="module")
def mounted() -> Iterator[Stack]:
    section = GatewaySection(root_path="/llm/a", request_timeout_s=WAIT_S, max_body_bytes=1000)
    with running_stack(section) as stack:
        yield stack


def test_a_mount_prefix_may_come_or_be_removed(mounted: Stack) -> None:
    for prefix in ("", "/llm/a"):
        assert mounted.http.get(f"{prefix}/v1/models").status_code == 200
        assert mounted.http.get(f"{prefix}/-/routes").json() == {"/": "expertmesh"}
        found = mounted.http.get(f"{prefix}/openapi.json").json()
        assert found["servers"] == [{"url": "/llm/a"}]
    for path in ("/llm/ab/v1/models", "/llm/av1/models", "/llm/v1/models"):
        assert mounted.http.get(path).status_code == 404


def test_a_client_that_waits_is_asked_for_a_body_that_is_not_too_long(mounted: Stack) -> None:
    address = ("127.0.0.1", urlsplit(mounted.url).port)
    for size, first in ((1001, b"HTTP/1.1 413"), (1000, b"HTTP/1.1 100 Continue\r\n\r\n")):
        with socket.create_connection(address, timeout=WAIT_S) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n"
                b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % size
            )
            answer = client.recv(25)
            assert answer.startswith(first)
            if size == 1000:
                client.sendall(b" " * size)
            while piece := client.recv(4096):  # the server closes
                answer += piece
        assert b"\r\nconnection: close\r\n" in answer


def test_load_balancers_of_serve_find_its_paths() -> None:
    with running_stack() as stack:
        assert stack.http.get("/-/healthz").text == "success"
        stack.call(lambda: stack.gateway.leave(0.0))
        for path in ("/-/healthz", "/-/routes"):
            answer = stack.http.get(path)
            assert (answer.status_code, answer.text) == (503, "This node is being drained.")
