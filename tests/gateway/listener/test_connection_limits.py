"""Limits on connections: from the limit on open files, and without a walk over connections."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import resource
import socket

import pytest
from starlette.types import Receive, Scope, Send

from benchmarks.harness.distributed import free_ports
from cluster.config.gateway import GatewaySection
from gateway.listener import connection_limits as limits
from gateway.listener.connection_limits import NUM_FILES, ConnectionLimits, raise_file_limit
from gateway.listener.http_listener import _MAX_ACCEPTS, HttpListener
from gateway.listener.timed_protocol import TimedHttpProtocol
from tests.gateway.stack import WAIT_S

REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize("num_files", [256, 1024, 4096, 16_384, 20_000])
def test_connections_leave_files_for_everything_else(num_files: int) -> None:
    http, grpc = limits.connection_limits(num_files)
    assert http > grpc > 0
    assert num_files - http - grpc == min(1024, num_files // 2)


@pytest.mark.parametrize(
    ("soft", "hard", "raised", "has_warning"),
    [
        (1024, 1 << 20, NUM_FILES, False),
        (1024, resource.RLIM_INFINITY, NUM_FILES, False),
        (1024, 4096, 4096, True),
        (65_536, 1 << 20, None, False),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None, False),
    ],
)
def test_the_limit_on_files_is_raised_as_far_as_needed(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    soft: int,
    hard: int,
    raised: int | None,
    has_warning: bool,
) -> None:
    set_limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: set_limits.append(pair))
    with caplog.at_level(logging.WARNING):
        found = raise_file_limit()
    assert set_limits == ([] if raised is None else [(raised, hard)])
    assert found == (ConnectionLimits(2304, 768) if has_warning else (11_520, 3840))
    assert ("at most 4096 files can be open" in caplog.text) is has_warning


def test_a_system_that_refuses_more_files_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kind: int, pair: tuple[int, int]) -> None:
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert raise_file_limit() == limits.connection_limits(1024)


class Streams:
    """An application with endless responses."""

    def __init__(self) -> None:
        self.num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.num_open += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        self.num_open -= 1


def listener_of(app: Streams, max_connections: int) -> HttpListener:
    (port,) = free_ports(1)
    section = GatewaySection(port=port)
    return HttpListener(app, section, "HTTP", "127.0.0.1", port, max_connections=max_connections)


def test_a_new_connection_looks_at_none_of_the_open_streams(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_looks, num_streams = 0, 40
    is_idle: property = vars(TimedHttpProtocol)["is_idle"]

    def counted(protocol: TimedHttpProtocol) -> bool:
        nonlocal num_looks
        num_looks += 1
        return bool(is_idle.__get__(protocol))

    async def work() -> None:
        nonlocal num_looks
        app = Streams()
        listener = listener_of(app, num_streams)
        port = await listener.start()
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(num_streams)]
        for reader, writer in opened:
            writer.write(REQUEST)
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        num_looks = 0
        for _ in range(10):  # no stream is idle, so that the new one ends
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()
        assert num_looks <= 10 * 2
        assert app.num_open == num_streams == len(listener.connections)
        for _, writer in opened:
            writer.close()
        await listener.stop()
        assert not listener._idle

    monkeypatch.setattr(TimedHttpProtocol, "is_idle", property(counted))
    asyncio.run(asyncio.wait_for(work(), WAIT_S))


def test_the_connection_that_is_idle_for_longest_ends() -> None:
    async def work() -> None:
        app = Streams()
        listener = listener_of(app, 3)
        port = await listener.start()
        silent, streaming, begun = [
            await asyncio.open_connection("127.0.0.1", port) for _ in range(3)
        ]
        streaming[1].write(REQUEST)
        assert await streaming[0].readline() == b"HTTP/1.1 200 OK\r\n"
        begun[1].write(REQUEST[:10])
        newer = await asyncio.open_connection("127.0.0.1", port)
        with pytest.raises(ConnectionError):  # a reset, or the end of the data
            raise ConnectionError((await silent[0].read()).decode())
        newest = await asyncio.open_connection("127.0.0.1", port)
        with pytest.raises(ConnectionError):
            raise ConnectionError((await begun[0].read()).decode())
        for _, writer in (newer, newest):
            writer.write(REQUEST)
        assert await newest[0].readline() == b"HTTP/1.1 200 OK\r\n"
        assert await newer[0].readline() == b"HTTP/1.1 200 OK\r\n"
        assert app.num_open == 3
        for _, writer in (silent, streaming, begun, newer, newest):
            writer.close()
        await listener.stop()

    asyncio.run(asyncio.wait_for(work(), WAIT_S))


def test_few_connections_are_accepted_at_a_time() -> None:
    async def work() -> None:
        app = Streams()
        listener = listener_of(app, 1000)
        port = await listener.start()
        waiting = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
        numbers = [0]
        while numbers[-1] < len(waiting):
            await asyncio.sleep(0)
            numbers.append(len(listener.connections))
        assert max(b - a for a, b in itertools.pairwise(numbers)) <= _MAX_ACCEPTS
        for connection in waiting:
            connection.close()
        await listener.stop()

    asyncio.run(asyncio.wait_for(work(), WAIT_S))


def test_a_refused_new_connection_is_not_counted_twice() -> None:
    """Many connections come in the same iteration of the event loop."""

    async def work() -> None:
        app = Streams()
        listener = listener_of(app, 5)
        port = await listener.start()
        waiting = [socket.create_connection(("127.0.0.1", port)) for _ in range(30)]
        for connection in waiting[-5:]:
            connection.sendall(REQUEST)
        while app.num_open < 5:
            await asyncio.sleep(0.001)
        assert len(listener.connections) == 5
        for connection in waiting:
            connection.close()
        await listener.stop()

    asyncio.run(asyncio.wait_for(work(), WAIT_S))
