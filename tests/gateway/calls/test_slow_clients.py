"""Clients that do not read their streams: their work ends, they can learn why, others go on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.core.tuning import GatewayTuning
from gateway.http.middleware import PIECE_BYTES, Responder
from gateway.protocols import build_public_app
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.fakes import MAX_MODEL_LEN
from tests.gateway.grpc.test_grpc import failure, request_of
from tests.gateway.sse_client import parse_events
from tests.gateway.stack import WAIT_S, Stack, complete, running_stack

MAX_UNREAD_BYTES = 100_000
NUM_TOKENS = MAX_MODEL_LEN - 10
LONG: dict[str, Any] = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "n": 16}
SMALL_WINDOWS = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)]
"""A client that takes 64 KiB of a stream that it does not read."""


@pytest.fixture(scope="module")
def running() -> Iterator[Stack]:
    """A gateway that lets little wait."""
    with running_stack(tuning=GatewayTuning(max_unread_bytes=MAX_UNREAD_BYTES)) as stack:
        yield stack


@pytest.fixture
def slow(running: Stack) -> Iterator[Stack]:
    """That gateway with its engine's defaults, which serves others before and after."""
    with running.as_new():
        complete(running, prompt="x", max_tokens=3)
        yield running
        running.wait_no_requests()
        complete(running, prompt="x", max_tokens=3)


class Client:
    """An HTTP client on the loop of a gateway; it reads while ``reads`` is set."""

    def __init__(self, body: dict[str, Any]) -> None:
        self._body = json.dumps(body).encode()
        self._has_asked = False
        self._leaves = asyncio.Event()
        self.reads = asyncio.Event()
        self.status = 0
        self.content = b""

    def leave(self) -> None:
        """Close the connection: what is sent to it from now on is dropped."""
        self._leaves.set()
        self.reads.set()

    async def call(self, app: ASGIApp) -> None:
        """Run the request to its end."""
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "headers": [(b"content-type", b"application/json")],
            "query_string": b"",
        }
        await app(scope, self._receive, self._send)

    async def _receive(self) -> Message:
        if self._has_asked:
            await self._leaves.wait()
            return {"type": "http.disconnect"}
        self._has_asked = True
        return {"type": "http.request", "body": self._body}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        await self.reads.wait()
        self.content += message["body"]


def aborted(stack: Stack) -> Callable[[], bool]:
    """Whether the one request that was sent last was aborted."""
    return lambda: (stack.engine.requests[-1].request_id, ()) in stack.engine.aborts


async def until_aborted(stack: Stack, client: Client, app: ASGIApp) -> asyncio.Task[None]:
    """The call of a client that does not read, once its request was aborted."""
    calling = asyncio.create_task(client.call(app))
    while not aborted(stack)():
        await asyncio.sleep(0.01)
    return calling


def disconnects(stack: Stack) -> float:
    """Clients that left, as the metrics count them."""
    (family,) = stack.gateway.metrics.client_disconnects.collect()
    return sum(each.value for each in family.samples if each.name.endswith("_total"))


def check_ends_by_name(content: bytes) -> None:
    """The stream's last event is the error."""
    *_, last = parse_events(content.decode())
    assert (last["error"]["type"], last["error"]["code"]) == ("timeout_error", "slow_client")


def test_a_stream_that_nobody_reads_ends_over_http(slow: Stack) -> None:
    async def work() -> bytes:
        client = Client({"prompt": "x", "stream": True, **LONG})
        calling = await until_aborted(slow, client, build_public_app(slow.gateway))
        assert slow.gateway.admission.admission is not None
        assert slow.gateway.admission.admission.num_requests == 0
        client.reads.set()
        await calling
        return client.content

    check_ends_by_name(slow.run(work()))


@pytest.fixture(scope="module")
def impatient() -> Iterator[Stack]:
    """A gateway whose clients must read soon, though there is room for all of their streams."""
    with running_stack(tuning=GatewayTuning(unread_limit_s=0.2)) as stack:
        complete(stack, prompt="x", max_tokens=3)
        stack.engine.step_s = 0.002
        yield stack


def test_a_stream_of_which_nothing_is_read_for_long_ends(impatient: Stack) -> None:
    async def work() -> bytes:
        client = Client({"prompt": "x", "stream": True, **LONG})
        calling = await until_aborted(impatient, client, build_public_app(impatient.gateway))
        client.reads.set()
        await calling
        return client.content

    content = impatient.run(work())
    check_ends_by_name(content)
    assert b"has read nothing for 0.2 s" in content
    impatient.wait_no_requests()


def test_a_stream_that_is_read_may_last_longer(impatient: Stack) -> None:
    async def work() -> bytes:
        client = Client({"prompt": "x", "stream": True, **LONG})
        client.reads.set()
        await client.call(build_public_app(impatient.gateway))
        return client.content

    assert impatient.run(work()).endswith(b"data: [DONE]\n\n")


def test_a_stream_that_nobody_reads_ends_over_grpc(slow: Stack) -> None:
    slow.engine.step_s = 0.001  # else the queue is full before the first message is sent
    with grpc.insecure_channel(slow.grpc_target, options=SMALL_WINDOWS) as channel:
        message = request_of(text="x", sampling_params=LONG, output_options={"logprobs": 5})
        call: Any = InferenceStub(channel).GenerateStream(message, timeout=WAIT_S)
        next(call)
        slow.wait_for(aborted(slow), "the abort")
        slow.wait_no_requests()
        code, _, details = failure(lambda: list(call))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details["ErrorInfo"].reason == "slow_client"


def test_a_long_answer_comes_in_pieces(slow: Stack) -> None:
    """Each waits until the client has taken the ones before."""
    body = {"prompt": "x", "logprobs": 5, "seed": 3, **LONG}

    async def work() -> tuple[bytes, int]:
        app, most = build_public_app(slow.gateway), 0

        async def measured(scope: Scope, receive: Receive, send: Send) -> None:
            async def count(message: Message) -> None:
                nonlocal most
                most = max(most, len(message.get("body", b"")))
                await send(message)

            await app(scope, receive, count)

        client = Client(body)
        client.reads.set()
        await client.call(measured)
        return client.content, most

    content, most = slow.run(work())
    assert most <= PIECE_BYTES < len(content)
    assert json.loads(content)["choices"] == complete(slow, **body)["choices"]


def test_a_long_answer_of_any_route_comes_in_pieces() -> None:
    """Whole answers of Starlette, as those to GET requests."""
    content, pieces = bytes(5 * PIECE_BYTES + 1), list[bytes]()

    async def work() -> bool:
        async def take(message: Message) -> None:
            pieces.append(message["body"])

        responder = Responder(take)
        await responder({"type": "http.response.body", "body": content})
        return responder.is_complete

    assert asyncio.run(asyncio.wait_for(work(), WAIT_S))
    assert b"".join(pieces) == content
    assert max(map(len, pieces)) <= PIECE_BYTES
