"""What the options of the gRPC server come to."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from cluster.config.gateway import GatewaySection
from gateway.grpc.server import server_options
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.stack import MODEL, WAIT_S, Stack, running_stack
from tests.harness.http2_client import (
    ACK,
    CONTINUATION,
    END_HEADERS,
    HEADERS,
    PING,
    PREFACE,
    SETTINGS,
    Frame,
    literal,
)

SLOWER = 30
"""The server's times are this many times those of the tests."""
NUM_TRIES = 30
"""Calls of one size; gRPC would refuse some of them only between its two limits."""
OPENING = PREFACE + Frame(SETTINGS, 0, 0, b"").encode()
ACKNOWLEDGED = OPENING + Frame(SETTINGS, ACK, 0, b"").encode()
PADDING = b"".join(literal(f"x-{number}", "y") for number in range(1000))


@contextlib.contextmanager
def quick_server(**changed: int) -> Iterator[tuple[str, int]]:
    """gRPC with our options, and with all times a thirtieth of ours."""
    options: dict[str, int] = dict(server_options()) | {
        f"grpc.{name}": value for name, value in changed.items()
    }
    times = {n: v // SLOWER for n, v in options.items() if n.endswith(("_ms", "_timeout"))}
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads, options=list((options | times).items()))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield "127.0.0.1", port
        finally:
            server.stop(None)


def read_to_end(connection: socket.socket) -> bytes:
    """All that the server sends until it closes the connection."""
    connection.settimeout(WAIT_S)
    return b"".join(iter(lambda: connection.recv(4096), b""))


def test_a_silent_connection_is_closed_after_its_ping() -> None:
    with quick_server() as address, socket.create_connection(address) as connection:
        connection.sendall(ACKNOWLEDGED)
        received = read_to_end(connection)
    assert Frame(PING, 0, 0, bytes(8)).encode()[:9] in received
    assert received.endswith(b"ping_timeout")  # the reason of its GOAWAY


@pytest.mark.parametrize(
    ("opening", "trickle", "reason"),
    [
        (b"", b"", b"timeout"),
        (b"", PREFACE, b"timeout"),
        (OPENING, b"", b"settings_timeout"),
        (ACKNOWLEDGED, Frame(HEADERS, END_HEADERS, 1, PADDING).encode(), b"connection idle"),
        (
            ACKNOWLEDGED + Frame(HEADERS, 0, 1, literal("a", "b")).encode(),
            Frame(CONTINUATION, 0, 1, literal("a", "b")).encode() * 1000,
            b"connection idle",
        ),
        (ACKNOWLEDGED, Frame(PING, ACK, 0, bytes(8)).encode() * 1000, b"connection idle"),
    ],
    ids=["silent", "slow preface", "no acknowledgement", "slow head", "slow heads", "pings"],
)
def test_a_slow_head_is_closed(opening: bytes, trickle: bytes, reason: bytes) -> None:
    """However it is sent: a byte at a time keeps no connection open."""
    is_over = threading.Event()
    with quick_server() as address, socket.create_connection(address) as connection:

        def send() -> None:
            with contextlib.suppress(OSError):
                connection.sendall(opening)
                for byte in trickle:
                    if is_over.wait(0.02):
                        return
                    connection.sendall(bytes((byte,)))

        sender = threading.Thread(target=send)
        sender.start()
        try:
            received = read_to_end(connection)
        except ConnectionError:
            received = reason  # closed before all was read
        finally:
            is_over.set()
            sender.join()
    assert reason in received


def test_connections_above_the_limit_are_closed() -> None:
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(quick_server(max_allowed_incoming_connections=2))
        for _ in range(2):
            held = stack.enter_context(socket.create_connection(address))
            held.sendall(ACKNOWLEDGED)
            held.settimeout(WAIT_S)
            assert held.recv(9)
        beyond = stack.enter_context(socket.create_connection(address))
        with contextlib.suppress(ConnectionError):
            assert read_to_end(beyond) == b""


def refusals(stub: InferenceStub, num_bytes: int) -> list[str]:
    """What the server says to calls with a metadata value of this size."""
    metadata = (("x-pad", "x" * num_bytes),)
    calls = [  # without a time limit, which is metadata too
        stub.ListModels.future(pb.ListModelsRequest(), metadata=metadata) for _ in range(NUM_TRIES)
    ]
    codes = [call.code() for call in calls]
    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    return [str(call.details()) for call in calls if call.code() is not grpc.StatusCode.OK]


def test_metadata_beyond_its_limit_is_always_refused(stack: Stack) -> None:
    with grpc.insecure_channel(stack.grpc_target) as channel:
        stub = InferenceStub(channel)
        beyond = refusals(stub, 16_300)
        assert len(beyond) == NUM_TRIES
        counted = re.search(r"exceeds hard limit \((\d+) vs\. 16385\)", beyond[0])
        assert counted is not None, beyond[0]
        most = 16_300 - (int(counted[1]) - 16_384)
        assert refusals(stub, most) == []
        for num_bytes in (most + 1, 17_000):
            assert len(refusals(stub, num_bytes)) == NUM_TRIES


def test_calls_may_take_a_year() -> None:
    with running_stack(GatewaySection(request_timeout_s=365 * 24 * 3600.0)) as stack:
        with grpc.insecure_channel(stack.grpc_target) as channel:
            request = pb.GenerateRequest(model=MODEL, text="hello")
            found = InferenceStub(channel).Generate(request, timeout=WAIT_S)
        assert found.choices[0].text
        response = stack.http.post("/v1/completions", json={"prompt": "hello"})
    assert response.status_code == 200


def test_all_calls_of_a_burst_wait_until_they_are_accepted() -> None:
    """gRPC cancels calls at random once more wait than the server allows, by default 1,000."""
    number, options = 2000, [("grpc.use_local_subchannel_pool", 1)]
    section = GatewaySection(max_queue=2 * number, request_timeout_s=WAIT_S)
    held, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        let_go.wait(WAIT_S)

    with (
        running_stack(section) as stack,
        grpc.insecure_channel(stack.grpc_target, options) as first,
        grpc.insecure_channel(stack.grpc_target, options) as second,
        ThreadPoolExecutor(1) as pool,
    ):
        holding = pool.submit(stack.call, hold)
        assert held.wait(WAIT_S)
        calls = [
            InferenceStub(channel).ListModels.future(pb.ListModelsRequest(), timeout=WAIT_S)
            for channel in (first, second)
            for _ in range(number // 2)
        ]
        let_go.set()
        holding.result(WAIT_S)
        assert Counter(call.code() for call in calls) == {grpc.StatusCode.OK: number}
