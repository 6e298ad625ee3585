"""A cheap client of many streams: one thread, one socket for each stream, no HTTP library."""

from __future__ import annotations

import asyncio
import json
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc

from benchmarks.harness.paced_engine import MAX_MODEL_LEN, prompt_of
from cluster.core.grpc_poller import keep_grpc_poller
from protos.inference_pb2 import GenerateRequest
from protos.inference_pb2_grpc import InferenceStub
from protos.types_pb2 import SamplingParams, TokenIds

_EVENT = b"data: {"
_MAX_TOKENS = MAX_MODEL_LEN - 16
_NUM_OPENING = 64
"""Number of streams that are opened at the same time."""
_STREAMS_PER_CHANNEL = 512


class HttpStreams:
    """Open completion streams of one port; ``read`` records when tokens arrive."""

    def __init__(self, port: int, num_streams: int) -> None:
        self._port = port
        self.received: list[tuple[int, float]] = []
        """For each token the number of its stream, and its monotonic time."""
        self._selector = selectors.EpollSelector()
        self._places = range(num_streams)

    def open(self, is_open: Callable[[], bool]) -> None:
        """Send all requests; a request is sent when most of the earlier ones have a status."""
        waiting: deque[socket.socket] = deque()
        for place in self._places:
            connection = socket.create_connection(("127.0.0.1", self._port), timeout=60.0)
            connection.sendall(_http_request(place))
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ, place)
            waiting.append(connection)
            if not place % _NUM_OPENING:
                self.read(0.0)
        while not is_open():
            self.read(0.01)

    def read(self, seconds: float) -> None:
        """Read for some seconds. Raises ``RuntimeError`` if a stream ends or has an error."""
        end_s = time.monotonic() + seconds
        while True:
            for key, _ in self._selector.select(max(0.0, min(0.1, end_s - time.monotonic()))):
                data = key.fileobj.recv(65536)  # type: ignore[union-attr]
                now_s = time.monotonic()
                if not data or b'"error"' in data:
                    raise RuntimeError(f"stream {key.data} ended: {data[:300]!r}")
                for _ in range(data.count(_EVENT)):
                    self.received.append((key.data, now_s))
            if time.monotonic() >= end_s:
                return

    def close(self) -> None:
        """Close all connections."""
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()


class GrpcStreams:
    """The same over gRPC, on a few connections."""

    def __init__(self, port: int, num_streams: int) -> None:
        self._port, self._num_streams = port, num_streams
        self.received: list[tuple[int, float]] = []
        """For each token the number of its stream, and its monotonic time."""
        self._loop = asyncio.new_event_loop()
        self._channels: list[grpc.aio.Channel] = []
        self._tasks: list[asyncio.Task[None]] = []

    def open(self, is_open: Callable[[], bool]) -> None:
        """Start all calls, and wait until the worker has them."""
        self._loop.run_until_complete(self._open(is_open))

    async def _open(self, is_open: Callable[[], bool]) -> None:
        keep_grpc_poller()
        options = [("grpc.use_local_subchannel_pool", 1)]
        for place in range(self._num_streams):
            if not place % _STREAMS_PER_CHANNEL:
                channel = grpc.aio.insecure_channel(f"127.0.0.1:{self._port}", options)
                self._channels.append(channel)
                stub = InferenceStub(channel)
            self._tasks.append(self._loop.create_task(self._follow(stub, place)))
            if not place % _NUM_OPENING:
                await asyncio.sleep(0.05)
        while not is_open():
            await asyncio.sleep(0.01)
            self._check()

    async def _follow(self, stub: InferenceStub, place: int) -> None:
        params = SamplingParams(max_tokens=_MAX_TOKENS, temperature=0.0, ignore_eos=True)
        ids = TokenIds(ids=prompt_of(place))
        request = GenerateRequest(token_ids=ids, sampling_params=params)
        chunks: Any = stub.GenerateStream(request)  # the stub is typed for channels that block
        async for _ in chunks:
            self.received.append((place, time.monotonic()))
        raise RuntimeError(f"stream {place} ended")

    def read(self, seconds: float) -> None:
        """Read for some seconds. Raises the error of a stream that has ended."""
        self._loop.run_until_complete(asyncio.sleep(seconds))
        self._check()

    def _check(self) -> None:
        for task in self._tasks:
            if task.done():
                task.result()

    def close(self) -> None:
        """End all calls."""
        self._loop.run_until_complete(self._close())
        self._loop.close()

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels:
            await channel.close(None)


def _http_request(place: int) -> bytes:
    fields = {"prompt": prompt_of(place), "max_tokens": _MAX_TOKENS, "temperature": 0}
    body = json.dumps({**fields, "ignore_eos": True, "stream": True}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
