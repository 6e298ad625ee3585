"""The wait for a gateway; with TLS see ``tests/gateway/auth/test_tls.py``."""

from __future__ import annotations

import socket
import threading

import pytest

from cluster.config.gateway import GatewaySection
from cluster.core.errors import StartError
from cluster.launch.readiness import wait_ready
from tests.cluster.cli.fake_gateway import fake_gateway

PLAIN = GatewaySection()


def never() -> list[str]:
    raise AssertionError("without a CA for clients its port itself is asked")


def test_it_ends_when_the_gateway_is_ready() -> None:
    with fake_gateway() as gateway:
        wait_ready(gateway.url, PLAIN, never)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 9\r\n\r\nload", "IncompleteRead"),
        (b"something else\r\n\r\n", "something else"),
    ],
)
def test_a_gateway_that_dies_while_it_answers_is_not_ready(answer: bytes, why: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(StartError, match=why):
            wait_ready(f"http://127.0.0.1:{server.getsockname()[1]}", PLAIN, never, limit_s=0.0)
        thread.join()


def test_it_gives_up_with_the_gateway_s_own_reasons() -> None:
    with fake_gateway() as gateway:
        gateway.ready = (503, {"ready": False, "reasons": ["loading"]})
        with pytest.raises(StartError, match="loading"):
            wait_ready(gateway.url, PLAIN, never, limit_s=0.0)
        url = gateway.url
    with pytest.raises(StartError, match="refused"):
        wait_ready(url, PLAIN, never, limit_s=0.0)
