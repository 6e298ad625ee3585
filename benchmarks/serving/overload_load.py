"""Clients of ``benchmarks.serving.overload``: streams over HTTP, and a tenth of them over gRPC.

They run in the benchmark's process, on the cores of the server, so they must be cheap: with httpx
(5 ms of a core a request) the clients took a third of both cores at ten times the capacity, and
their own delays were measured.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
from google.rpc import error_details_pb2, status_pb2

from benchmarks.harness.server import Served
from protos import inference_pb2 as pb
from protos import types_pb2
from protos.inference_pb2_grpc import InferenceStub

GREEDY, MODEST = "greedy", "modest"
REFUSED = ("429", "RESOURCE_EXHAUSTED")
MOST_REQUESTS_PER_S = 100
"""Most requests a second under overload; the length of requests is chosen accordingly. A rejected
request takes 3 ms of the clients and the server: 100 a second are 15% of two cores."""
_FIRST_MEAN = 256
"""Mean tokens of a request before the capacity is known."""
_GRPC_SHARE = 0.1
_PROMPT_TOKENS = 32
_LIMIT_S = 300.0
_LOOK_S = 1.0
_IDLE_S = 1.0
"""Idle time after which a connection is not reused, as the server may close it."""
_IDS = re.compile(rb'"token_ids":\s*\[([^\]]+)\]')
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_RETRY = re.compile(rb"\r\nretry-after-ms: *(\d+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Refusal:
    """One rejection as the client received it."""

    key: str
    at_s: float
    """Monotonic time of its arrival."""
    took_ms: float
    retry_s: float | None
    """Retry time in the response."""


@dataclass(slots=True)
class Phase:
    """Results of the clients in one phase."""

    name: str
    begin_s: float
    """Monotonic time from which tokens are counted."""
    end_s: float = float("inf")
    statuses: Counter[str] = field(default_factory=Counter)
    """Number of responses by HTTP status or gRPC code."""
    num_tokens: int = 0
    """Tokens received from ``begin_s`` to ``end_s``."""
    refusals: list[Refusal] = field(default_factory=list)
    ttft_ms: dict[str, list[tuple[float, float]]] = field(
        default_factory=lambda: {GREEDY: [], MODEST: []}
    )
    """Key -> pairs of send time and time to the first token."""
    num_cut: int = 0
    """Accepted streams that ended before their last token."""

    @property
    def num_accepted(self) -> int:
        return self.statuses["200"] + self.statuses["OK"]

    @property
    def num_refused(self) -> int:
        return sum(self.statuses[status] for status in REFUSED)

    @property
    def num_other(self) -> int:
        """Responses that are neither accepted nor rejected."""
        return self.statuses.total() - self.num_accepted - self.num_refused

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / (self.end_s - self.begin_s)

    def num_refused_of(self, key: str) -> int:
        return sum(refusal.key == key for refusal in self.refusals)

    def median_ttft_ms(self, key: str) -> float:
        return statistics.median([ms for _, ms in self.ttft_ms[key]] or [float("nan")])


def retry_of(details: bytes) -> float | None:
    """Seconds of the ``RetryInfo`` in ``grpc-status-details-bin``."""
    info = error_details_pb2.RetryInfo()
    for detail in status_pb2.Status.FromString(details).details:
        if detail.Unpack(info):
            return float(info.retry_delay.ToMilliseconds()) / 1000
    return None


class _Connections:
    """HTTP connections that are kept for the next request."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._idle: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def take(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return the last used connection, or a new one."""
        while self._idle:
            used_s, reader, writer = self._idle.pop()
            if time.monotonic() - used_s < _IDLE_S and not reader.at_eof():
                return reader, writer
            writer.close()
        return await asyncio.open_connection(*self._address)

    def give_back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Return a connection after its response was read to the end."""
        self._idle.append((time.monotonic(), reader, writer))

    def close(self) -> None:
        """Close idle connections."""
        for _, _, writer in self._idle:
            writer.close()


async def _parts(head: bytes, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Yield the parts of a response body as they arrive."""
    if (length := _LENGTH.search(head)) is not None:
        yield await reader.readexactly(int(length[1]))
        return
    while size := int(await reader.readline(), 16):
        yield await reader.readexactly(size)
        await reader.readline()
    await reader.readline()


class Clients:
    """Clients that send requests with one of two keys."""

    def __init__(self, server: Served, seed: int) -> None:
        self._draw = random.Random(seed)
        self._connections = _Connections(server.http_address)
        self._http = httpx.AsyncClient(base_url=server.http, timeout=_LIMIT_S)
        self._channel = grpc.aio.insecure_channel(server.grpc)
        self._stub: Any = InferenceStub(self._channel)
        self._running: set[asyncio.Task[str]] = set()
        self.mean_tokens = _FIRST_MEAN
        """Mean tokens of a request. A request has 0.5 to 1.5 times as many, so that requests that
        start together do not end together."""
        self.most_waiting = 0
        """Most sequences that waited at the worker at one time."""

    async def close(self) -> None:
        """End all connections."""
        self._connections.close()
        await self._http.aclose()
        await self._channel.close(None)

    async def ask(self, key: str, phase: Phase, max_tokens: int | None = None) -> str:
        """Run one stream and return its status. Without ``max_tokens``, its length is random."""
        if max_tokens is None:
            max_tokens = self._draw.randint(self.mean_tokens // 2, self.mean_tokens * 3 // 2)
        prompt = [self._draw.randrange(4, 1000) for _ in range(_PROMPT_TOKENS)]
        is_grpc = self._draw.random() < _GRPC_SHARE
        ask = self._ask_grpc if is_grpc else self._ask_http
        began, times = time.monotonic(), _Times(phase, key, max_tokens)
        try:
            status, retry_s = await ask(prompt, max_tokens, times)
        except (OSError, EOFError) as err:  # a connection that broke
            status, retry_s = type(err).__name__, None
        phase.statuses[status] += 1
        if status in REFUSED:
            now = time.monotonic()
            phase.refusals.append(Refusal(key, now, 1000 * (now - began), retry_s))
        elif status in ("200", "OK"):
            phase.num_cut += times.num_left > 0
        return status

    async def _ask_http(
        self, prompt: Sequence[int], max_tokens: int, times: _Times
    ) -> tuple[str, float | None]:
        body = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        content = json.dumps(body)
        request = (
            "POST /v1/completions HTTP/1.1\r\nHost: server\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {times.key}\r\nContent-Length: {len(content)}\r\n\r\n{content}"
        )
        reader, writer = await self._connections.take()
        writer.write(request.encode())
        head = await reader.readuntil(b"\r\n\r\n")
        async for part in _parts(head, reader):
            times.saw(sum(1 + ids.count(b",") for ids in _IDS.findall(part)))
        self._connections.give_back(reader, writer)
        retry = _RETRY.search(head)
        return head.split(None, 2)[1].decode(), int(retry[1]) / 1000 if retry else None

    async def _ask_grpc(
        self, prompt: Sequence[int], max_tokens: int, times: _Times
    ) -> tuple[str, float | None]:
        request = pb.GenerateRequest(
            token_ids=types_pb2.TokenIds(ids=prompt),
            sampling_params=types_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        )
        metadata = (("authorization", f"Bearer {times.key}"),)
        try:
            async for chunk in self._stub.GenerateStream(request, metadata=metadata):
                times.saw(len(chunk.token_ids))
        except grpc.aio.AioRpcError as err:
            trailers: Any = err.trailing_metadata() or ()
            found: dict[str, Any] = dict(trailers)
            details = found.get("grpc-status-details-bin")
            return err.code().name, retry_of(details) if details else None
        return "OK", None

    async def eager(self, num_clients: int, ramp_s: float, seconds: float) -> Phase:
        """Run clients without pauses; tokens count for ``seconds`` after ``ramp_s``."""
        begin = time.monotonic() + ramp_s
        phase = Phase("clients without pauses", begin, begin + seconds)

        async def client() -> None:
            while time.monotonic() < phase.end_s:
                if await self.ask(GREEDY, phase) in REFUSED:
                    await asyncio.sleep(0.5)

        await asyncio.gather(*(client() for _ in range(num_clients)))
        return phase

    async def poisson(
        self, name: str, rates: dict[str, float], ramp_s: float, seconds: float
    ) -> Phase:
        """Send requests at random at the rate of each key; tokens count after ``ramp_s``. Use
        ``settle`` to wait for the remaining responses."""
        now = time.monotonic()
        phase = Phase(name, now + ramp_s, now + ramp_s + seconds)

        async def arrive(key: str, rate: float) -> None:
            due = now
            while (due := due + self._draw.expovariate(rate)) < phase.end_s:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                task = asyncio.create_task(self.ask(key, phase))
                self._running.add(task)
                task.add_done_callback(self._running.discard)

        await asyncio.gather(*(arrive(key, rate) for key, rate in rates.items()))
        return phase

    async def settle(self) -> None:
        """Wait for all responses."""
        await asyncio.gather(*self._running, return_exceptions=True)

    async def probe(self, name: str, key: str, seconds: float) -> Phase:
        """Send single short requests in sequence."""
        now = time.monotonic()
        phase = Phase(name, now, now + seconds)
        while time.monotonic() < phase.end_s:
            status = await self.ask(key, phase, max_tokens=1)
            await asyncio.sleep(0.25 if status in REFUSED else 0.02)
        return phase

    async def retry(self, refusals: Sequence[Refusal]) -> list[str]:
        """Send each rejected request again after its retry time; returns the statuses."""
        phase = Phase("retries", time.monotonic())

        async def again(refusal: Refusal) -> str:
            await asyncio.sleep(refusal.at_s + (refusal.retry_s or 0.0) - time.monotonic())
            return await self.ask(GREEDY, phase)

        return await asyncio.gather(*map(again, refusals))

    async def watch_queue(self) -> None:
        """Poll the length of the worker's queue until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            with suppress(httpx.HTTPError, KeyError):
                status = (await self._http.get("/cluster/v1/status", headers=_KEY)).json()
                for worker in status["workers"]:
                    waiting = int((worker.get("stats") or {}).get("num_requests_waiting", 0))
                    self.most_waiting = max(self.most_waiting, waiting)


_KEY = {"authorization": f"Bearer {MODEST}"}


@dataclass(slots=True)
class _Times:
    """Counts the tokens of one stream."""

    phase: Phase
    key: str
    num_left: int
    sent_s: float = field(default_factory=time.monotonic)
    is_first: bool = True

    def saw(self, num_tokens: int) -> None:
        now = time.monotonic()
        if self.is_first and num_tokens:
            self.phase.ttft_ms[self.key].append((self.sent_s, 1000 * (now - self.sent_s)))
            self.is_first = False
        self.num_left -= num_tokens
        if self.phase.begin_s <= now < self.phase.end_s:
            self.phase.num_tokens += num_tokens
