"""Clients that leave: their work ends at once, by every way there is to leave."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import grpc
import openai
import pytest

from benchmarks.harness.server import WAIT_S, Served
from benchmarks.harness.stalls import wait_until
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.grpc.test_grpc import request_of

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("unharmed")]

NUM_TOKENS = 3000
"""Of each choice: thousands of steps more than anybody waits for here."""
LONG: dict[str, Any] = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing drops the connection with RST."""

CLIENT = """
import json, sys, urllib.request
body = json.loads(sys.argv[2])
headers = {"content-type": "application/json"}
request = urllib.request.Request(sys.argv[1], json.dumps(body).encode(), headers)
with urllib.request.urlopen(request) as reply:
    print(reply.readline().decode(), flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def given_up(server: Served, num_choices: int = 1) -> Iterator[None]:
    """What is started within and left must be aborted, long before its end."""
    before = server.wait_idle()
    yield
    server.wait_engine("choices_abort_total", before["choices_abort_total"] + num_choices)
    after = server.wait_idle()
    assert after["choices_abort_total"] == before["choices_abort_total"] + num_choices
    assert after["choices_length_total"] == before["choices_length_total"]
    generated = after["generation_tokens_total"] - before["generation_tokens_total"]
    assert 0 < generated < num_choices * NUM_TOKENS
    looks = (server.engine()["steps_total"] for _ in range(50))
    assert any(one == other for one, other in pairwise(looks)), "an idle server goes on stepping"


def wait_running(server: Served, num_choices: int = 1) -> None:
    """Until all choices of the one request that was sent are being served."""
    server.wait_engine("num_requests_running", num_choices)
    tokens = server.engine()["generation_tokens_total"]
    server.wait_engine("generation_tokens_total", tokens + num_choices)


def send(server: Served, path: str, **fields: Any) -> socket.socket:
    """A request over a bare socket, so that closing it is all that the client does."""
    connection = socket.create_connection(server.http_address, timeout=WAIT_S)
    raw = json.dumps({**LONG, **fields}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: test\r\ncontent-length: {len(raw)}\r\n"
    connection.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + raw)
    return connection


def disconnects(server: Served) -> float:
    """Clients that left, as the metrics count them."""
    lines = server.client.get("/metrics").text.splitlines()
    (line,) = [each for each in lines if each.startswith("expertmesh:client_disconnects_total{")]
    return float(line.rpartition(" ")[2])


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("reset", [True, False], ids=["reset", "closed"])
def test_a_socket_that_closes(server: Served, stream: bool, reset: bool) -> None:
    before = disconnects(server)
    with given_up(server, num_choices=4):
        connection = send(server, "/v1/completions", prompt=["x", "y"], n=2, stream=stream)
        if stream:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 OK")
        wait_running(server, num_choices=4)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        connection.close()
    wait_until(lambda: disconnects(server) == before + 1, "the count of clients that left")


def test_a_client_that_is_killed_in_mid_stream(server: Served) -> None:
    body = json.dumps({**LONG, "prompt": "ROMEO:", "stream": True})
    with given_up(server):
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, f"{server.http}/v1/completions", body],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert client.stdout is not None
        assert client.stdout.readline().startswith(b"data: ")
        client.kill()
        client.communicate(timeout=WAIT_S)


def test_an_openai_stream_that_is_closed(server: Served) -> None:
    with (
        openai.OpenAI(base_url=f"{server.http}/v1", api_key="none", timeout=WAIT_S) as client,
        given_up(server),
    ):
        stream = client.chat.completions.create(
            model="expertmesh-demo",
            messages=[{"role": "user", "content": "Who is Juliet?"}],
            max_tokens=NUM_TOKENS,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(stream)
        wait_running(server)
        stream.close()


def test_a_grpc_stream_that_is_cancelled(server: Served, stub: InferenceStub) -> None:
    with given_up(server, num_choices=2):
        call: Any = stub.GenerateStream(request_of(text="ROMEO:", sampling_params={**LONG, "n": 2}))
        next(call)
        wait_running(server, num_choices=2)
        call.cancel()


def test_a_grpc_call_that_is_cancelled(server: Served, stub: InferenceStub) -> None:
    with given_up(server):
        call: Any = stub.Generate.future(request_of(text="ROMEO:", sampling_params=LONG))
        wait_running(server)
        call.cancel()


def test_a_grpc_channel_that_is_closed(server: Served) -> None:
    with given_up(server, num_choices=3):
        channel = grpc.insecure_channel(server.grpc)
        message = request_of(text="ROMEO:", sampling_params=LONG)
        calls = [iter(InferenceStub(channel).GenerateStream(message)) for _ in range(3)]
        for call in calls:
            next(call)
        channel.close()


def test_clients_that_stay_notice_nothing(server: Served, stub: InferenceStub) -> None:
    """A stream whose neighbours leave says what it says alone."""
    message = request_of(
        text="ROMEO:", sampling_params={"max_tokens": 100, "temperature": 1.0, "seed": 9}
    )
    alone = list(stub.Generate(message, timeout=WAIT_S).choices[0].token_ids)
    neighbours = [send(server, "/v1/completions", prompt="x" * i, stream=True) for i in (1, 50)]
    for neighbour in neighbours:
        assert neighbour.recv(4096)
    stream = iter(stub.GenerateStream(message, timeout=WAIT_S))
    tokens = list(next(stream).token_ids)
    for neighbour in neighbours:
        neighbour.close()
    tokens += [token for chunk in stream for token in chunk.token_ids]
    assert tokens == alone
