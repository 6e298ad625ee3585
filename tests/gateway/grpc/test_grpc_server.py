"""What the options of the gRPC server come to."""

from __future__ import annotations

import re
import socket
from concurrent.futures import ThreadPoolExecutor

import grpc

from gateway.grpc.server import server_options
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.stack import WAIT_S, Stack

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What an HTTP/2 client begins with; frames follow."""
SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
SETTINGS_ACK = bytes((0, 0, 0, 4, 1, 0, 0, 0, 0))
PING = bytes((0, 0, 8, 6, 0, 0, 0, 0, 0))
"""A ping's head; eight bytes follow."""
NUM_TRIES = 30
"""Calls of one size; gRPC would refuse some of them only between its two limits."""


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
