"""Little is sent to a client that takes nothing, and in the end its connection is closed."""

from __future__ import annotations

import asyncio
import socket
from urllib.parse import urlsplit

import pytest
from starlette.types import Receive, Scope, Send

from tests.gateway.stack import WAIT_S, start_http


class Endless:
    """Sends until the client has gone."""

    def __init__(self) -> None:
        self.has_ended = asyncio.Event()
        self.num_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await receive()
        watch = asyncio.ensure_future(receive())
        while not watch.done():
            await send({"type": "http.response.body", "body": b"x" * 60_000, "more_body": True})
            self.num_bytes += 60_000
            await asyncio.sleep(0)
        assert watch.result()["type"] == "http.disconnect"
        self.has_ended.set()


async def ask(app: Endless, is_read: bool) -> None:
    """Ask for an answer without end; the client reads or stays connected without reading."""
    url, stop = await start_http(app)
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await loop.sock_connect(client, (parts.hostname, parts.port))
        await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        num_bytes = 0
        while is_read and num_bytes < 10_000_000:
            num_bytes += len(await loop.sock_recv(client, 1_000_000))
            assert not app.has_ended.is_set()
        if not is_read:
            await asyncio.wait_for(app.has_ended.wait(), WAIT_S)
            assert (
                app.num_bytes < 1_000_000
            )  # else one that reads slowly would seem to take nothing
    await asyncio.wait_for(app.has_ended.wait(), WAIT_S)
    await stop()


@pytest.mark.parametrize("is_read", [False, True], ids=["unread", "read"])
def test_a_client_that_takes_nothing_is_cut(monkeypatch: pytest.MonkeyPatch, is_read: bool) -> None:
    limit_s = WAIT_S if is_read else 0.2
    monkeypatch.setattr("gateway.listener.bounded_protocol.STALL_LIMIT_S", limit_s)

    async def work() -> None:
        await ask(Endless(), is_read)

    asyncio.run(work())


def test_a_client_that_leaves_is_noticed_before_its_other_requests() -> None:
    """The request that runs ends, not only the last one that waits behind it."""

    async def work() -> None:
        app = Endless()
        url, stop = await start_http(app)
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * 3)
        await reader.readexactly(100_000)
        writer.transport.abort()
        await asyncio.wait_for(app.has_ended.wait(), WAIT_S)
        await stop()

    asyncio.run(work())
