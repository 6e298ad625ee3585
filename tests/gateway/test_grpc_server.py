"""What the options of the gRPC server come to."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import grpc

from gateway.grpc_server import server_options
from tests.gateway.stack import WAIT_S

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What an HTTP/2 client begins with; frames follow."""
SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
SETTINGS_ACK = bytes((0, 0, 0, 4, 1, 0, 0, 0, 0))
PING = bytes((0, 0, 8, 6, 0, 0, 0, 0, 0))
"""A ping's head; eight bytes follow."""


def test_a_silent_connection_is_closed_after_its_ping() -> None:
    """With all times a thirtieth of the server's."""
    times = ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms")
    options = [(name, n // 30 if name in times else n) for name, n in server_options()]
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads, options=options)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.settimeout(WAIT_S / 2)  # gRPC's own limit is 60 s
                connection.sendall(PREFACE + SETTINGS + SETTINGS_ACK)
                received = b"".join(iter(lambda: connection.recv(4096), b""))
        finally:
            server.stop(None)
    assert PING in received
    assert received.endswith(b"ping_timeout")  # the reason of its GOAWAY
