"""Rubbish and silence on every port that the cluster's own processes listen on."""

from __future__ import annotations

import contextlib
import random
import socket
import threading

import pytest

from benchmarks.harness.server import WAIT_S, Address, Served
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.grpc.test_grpc import request_of

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("unharmed")]

NUM_SILENT = 40
"""Connections to each port that never say a word: more than any of them keeps."""
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
    silent = [
        socket.create_connection(a, timeout=WAIT_S) for a in addresses for _ in range(NUM_SILENT)
    ]
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
    """Rubbish on all ports, one after the other, until the test ends it."""
    noise = random.Random(21)
    while not stop.is_set():
        for address in addresses:
            data = noise.randbytes(noise.randrange(1, 20_000))
            with (
                contextlib.suppress(ConnectionError),
                socket.create_connection(address, timeout=WAIT_S) as connection,
            ):
                connection.sendall(data)
