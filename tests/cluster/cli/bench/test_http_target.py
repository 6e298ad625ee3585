"""Connections of a workload that is sent over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import ssl
import threading
from pathlib import Path

from cluster.cli.bench.http_target import HttpTarget
from cluster.cli.main import make_parser
from cluster.cli.terminal.client import Client
from tests.harness.certificates import Certificates

EVENTS = (
    b'data: {"choices": [{"finish_reason": "length"}], "usage": {"completion_tokens": 3}}\n\n'
    b"data: [DONE]\n\n"
)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n"


async def complete_one(client: Client) -> int:
    target = HttpTarget(client, None, "")
    try:
        return await target.complete([1, 2], 3, lambda: None)
    finally:
        await target.close()


def test_no_connection_outlives_a_target(tmp_path: Path) -> None:
    """Not even one over TLS that the server does not close."""
    files = Certificates.make(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(files.server_cert, files.server_key)

    def answer() -> None:
        with context.wrap_socket(listener.accept()[0], server_side=True) as connection:
            connection.recv(1 << 16)
            connection.sendall(HEAD % len(EVENTS) + EVENTS)
            assert connection.recv(1) == b"", "the client's close_notify, without an answer"
            raw = socket.socket(fileno=connection.detach())
            with raw, contextlib.suppress(ConnectionResetError):
                raw.recv(1)
        ended.set()

    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, daemon=True).start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        words = ["--url", url, "--ca-cert", str(files.server_ca), "bench", "serve"]
        assert asyncio.run(complete_one(Client(make_parser().parse_args(words)))) == 3
        gc.collect()  # an open socket is an error
        assert ended.wait(60)
