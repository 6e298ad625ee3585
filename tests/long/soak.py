"""Whether anything grows: mixed traffic at a share of the capacity, and every process watched.

python -m tests.long.soak [--minutes 30] [--share 0.8] [--plot docs/reference/soak.svg]

``expertmesh serve`` with the bundled model. First its capacity for this traffic is measured with
clients that never wait; then requests arrive at random (Poisson) at a share of that rate: chats,
completions and gRPC streams, with log-probabilities, grammars and stop strings, clients that leave
in the middle, bad requests, scrapes. Memory (unique set size) and descriptors of every process are
read all along; at the end nothing may be left running. Ends with status 1 when something grew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil

from benchmarks.harness.processes import name_of
from benchmarks.harness.server import Served, running_server
from benchmarks.report.results import table
from benchmarks.report.svg import Line, line_chart
from cluster.launch.orphans import find_by_files
from protos.inference_pb2 import GenerateRequest
from protos.inference_pb2_grpc import InferenceStub
from protos.types_pb2 import SamplingParams

_LOOK_S = 5.0
_WARM_UP_SHARE = 0.25
"""Of the time, until memory is compared."""
GROWTH_LIMIT = 0.02
"""Of a process's memory after the warm-up, by its end."""
_LIMIT_S = 120.0
_NUM_EAGER = 24
"""Clients without pauses, by which the capacity is measured."""


@dataclass(slots=True)
class Process:
    """What was seen of one process."""

    name: str
    times_s: list[float] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    def growth(self) -> float:
        """Share by which memory grew from the end of the warm-up to the end, by a fitted line."""
        start = next(i for i, t in enumerate(self.times_s) if t >= self._warm_s)
        times, memory = self.times_s[start:], self.memory_mb[start:]
        if len(times) < 3:
            return 0.0
        slope, base = statistics.linear_regression(times, memory)
        at_start = base + slope * times[0]
        return slope * (times[-1] - times[0]) / at_start

    def new_descriptors(self) -> int:
        """Median of the last quarter above that of the one after the warm-up."""
        after = [
            d for t, d in zip(self.times_s, self.descriptors, strict=True) if t >= self._warm_s
        ]
        quarter = max(1, len(after) // 4)
        return int(statistics.median(after[-quarter:]) - statistics.median(after[:quarter]))

    @property
    def _warm_s(self) -> float:
        return _WARM_UP_SHARE * self.times_s[-1]


class Traffic:
    """The clients."""

    def __init__(self, server: Served, seed: int = 1) -> None:
        self.outcomes: Counter[str] = Counter()
        """By kind of request and what came of it."""
        self._draw = random.Random(seed)
        self._http = httpx.AsyncClient(
            base_url=server.http, timeout=_LIMIT_S, limits=httpx.Limits(max_connections=None)
        )
        self._channel = grpc.aio.insecure_channel(server.grpc)
        self._stub = InferenceStub(self._channel)
        self._kinds: Sequence[tuple[float, str, Callable[[dict[str, Any]], Awaitable[str]]]] = (
            (0.30, "completion", self._whole),
            (0.25, "stream", self._stream),
            (0.15, "grpc stream", self._grpc_stream),
            (0.10, "chat", self._chat),
            (0.08, "left in the middle", self._leave),
            (0.07, "bad request", self._bad),
            (0.05, "scrape", self._scrape),
        )

    async def close(self) -> None:
        """End all connections."""
        await self._http.aclose()
        await self._channel.close(None)

    async def one(self) -> None:
        """One request of a kind drawn by lot."""
        shares = [share for share, _, _ in self._kinds]
        ((_, name, ask),) = self._draw.choices(self._kinds, shares)
        try:
            outcome = await ask(self._fields())
        except (httpx.HTTPError, grpc.aio.AioRpcError) as err:
            outcome = f"{type(err).__name__} {err}"[:80]
        self.outcomes[f"{name}: {outcome}"] += 1

    def _fields(self) -> dict[str, Any]:
        draw = self._draw
        words = draw.choices(("the", "king", "of", "love", "and", "no", "more", "sword"), k=20)
        fields: dict[str, Any] = {
            "prompt": f"{draw.randrange(10**6)} {' '.join(words[: draw.randint(1, 20)])}",
            "max_tokens": draw.randint(8, 64),
            "temperature": draw.choice((0.0, 0.7, 1.0)),
            "seed": draw.randrange(10**6),
        }
        extra = draw.randrange(6)
        if extra == 0:
            fields["logprobs"] = 5
        elif extra == 1:
            fields["structured_outputs"] = {"regex": f"[a-z]{{{draw.randint(4, 40)}}}"}
        elif extra == 2:
            fields["stop"] = ["e ", "\n"]
        elif extra == 3:
            fields |= {"n": 3, "frequency_penalty": 0.5}
        return fields

    async def _whole(self, fields: dict[str, Any]) -> str:
        response = await self._http.post("/v1/completions", json=fields)
        return str(response.status_code)

    async def _chat(self, fields: dict[str, Any]) -> str:
        fields = {k: v for k, v in fields.items() if k != "logprobs"}
        messages = [{"role": "user", "content": fields.pop("prompt")}]
        body = {**fields, "messages": messages}
        response = await self._http.post("/v1/chat/completions", json=body)
        return str(response.status_code)

    async def _stream(self, fields: dict[str, Any]) -> str:
        return await self._read({**fields, "stream": True}, None)

    async def _leave(self, fields: dict[str, Any]) -> str:
        body = {**fields, "stream": True, "max_tokens": 200, "ignore_eos": True}
        return await self._read(body, self._draw.randint(1, 20))

    async def _read(self, body: dict[str, Any], num_events: int | None) -> str:
        count = 0
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                count += line.startswith("data: ")
                if '"error"' in line:
                    return line[:80]
                if num_events is not None and count >= num_events:
                    return "left"
        return str(response.status_code)

    async def _grpc_stream(self, fields: dict[str, Any]) -> str:
        params = SamplingParams(
            max_tokens=fields["max_tokens"],
            temperature=fields["temperature"],
            seed=fields["seed"],
        )
        call = self._stub.GenerateStream(
            GenerateRequest(text=fields["prompt"], sampling_params=params), timeout=_LIMIT_S
        )
        stop_after = self._draw.choice((None, None, None, 3))
        count = 0
        async for _ in call:
            count += 1
            if count == stop_after:
                call.cancel()
                return "cancelled"
        return "OK"

    async def _bad(self, fields: dict[str, Any]) -> str:
        wrong: dict[str, Any] = self._draw.choice(
            (
                {"temperature": -1},
                {"max_tokens": 10**9},
                {"prompt": []},
                {"model": "nobody"},
                {"structured_outputs": {"regex": "("}},
            )
        )
        response = await self._http.post("/v1/completions", json={**fields, **wrong})
        return f"{response.status_code // 100}xx"

    async def _scrape(self, fields: dict[str, Any]) -> str:
        path = self._draw.choice(("/metrics", "/v1/models", "/cluster/v1/status", "/nowhere"))
        response = await self._http.get(path)
        return f"{response.status_code // 100}xx"


@dataclass(slots=True)
class Found:
    """What a run showed."""

    minutes: float
    capacity: float
    """Requests a second that clients without pauses get."""
    rate: float
    """Requests a second of the run."""
    processes: list[Process]
    outcomes: Counter[str]
    left: list[str]
    """What was still held when all was over."""

    def failures(self) -> list[str]:
        """Everything that must not be; empty when all is well."""
        grown = [
            f"{p.name} grew by {p.growth():.1%}"
            for p in self.processes
            if p.growth() > GROWTH_LIMIT
        ]
        leaks = [
            f"{p.name} has {p.new_descriptors()} descriptors more"
            for p in self.processes
            if p.new_descriptors() > 2
        ]
        fine = ("200", "OK", "left", "cancelled", "2xx", "4xx")
        wrong = [
            f"{count} x {what}"
            for what, count in self.outcomes.items()
            if what.partition(": ")[2] not in fine
        ]
        return [*grown, *leaks, *wrong, *self.left]


async def soak(server: Served, minutes: float, share: float) -> Found:
    """Measure the capacity, then send and watch."""
    traffic = Traffic(server)
    eager_s = min(60.0, 6.0 * minutes)
    capacity = await _eager(traffic, eager_s)
    traffic.outcomes.clear()
    rate = share * capacity
    processes: dict[int, Process] = {}
    began = time.monotonic()
    watcher = asyncio.create_task(_watch(server, processes, began))
    running: set[asyncio.Task[None]] = set()
    draw = random.Random(2)
    due = began
    while due - began < 60.0 * minutes:
        due += draw.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        task = asyncio.create_task(traffic.one())
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    watcher.cancel()
    with suppress(asyncio.CancelledError):
        await watcher
    await traffic.close()
    lived = [p for p in processes.values() if p.times_s[-1] > 50.0 * minutes]
    left = await asyncio.to_thread(_left, server)
    return Found(minutes, capacity, rate, lived, traffic.outcomes, left)


async def _eager(traffic: Traffic, seconds: float) -> float:
    """Requests a second of clients that never wait."""
    end = time.monotonic() + seconds

    async def client() -> None:
        while time.monotonic() < end:
            await traffic.one()

    began = time.monotonic()
    await asyncio.gather(*(client() for _ in range(_NUM_EAGER)))
    return traffic.outcomes.total() / (time.monotonic() - began)


async def _watch(server: Served, processes: dict[int, Process], began: float) -> None:
    while True:
        await asyncio.to_thread(_look, server, processes, began)
        await asyncio.sleep(_LOOK_S)


def _look(server: Served, processes: dict[int, Process], began: float) -> None:
    for found in find_by_files(server.folder):
        with suppress(psutil.Error):
            process = psutil.Process(found.pid)
            seen = processes.setdefault(found.pid, Process(name_of(process)))
            seen.memory_mb.append(process.memory_full_info().uss / 2**20)
            seen.descriptors.append(process.num_fds())
            seen.times_s.append(time.monotonic() - began)


def _left(server: Served) -> list[str]:
    """Blocks, requests and streams that are still held."""
    try:
        stats = server.wait_idle()
    except AssertionError as err:
        return [str(err)]
    names = ("num_requests_running", "num_requests_waiting")
    return [f"{name} is {stats[name]:g}" for name in names if stats[name]]


def report(found: Found) -> str:
    """A table of the processes, and one of what came of the requests."""
    rows = [
        [
            p.name,
            f"{p.memory_mb[0]:.1f}",
            f"{p.memory_mb[-1]:.1f}",
            f"{p.growth():+.2%}",
            f"{p.descriptors[-1]}",
            f"{p.new_descriptors():+d}",
        ]
        for p in sorted(found.processes, key=lambda p: -p.memory_mb[-1])
    ]
    head = ["process", "first memory, MiB", "last memory, MiB", "growth after warm-up"]
    head += ["open descriptors", "new descriptors"]
    outcomes = [[what, str(count)] for what, count in sorted(found.outcomes.items())]
    words = (
        f"Requests arrive for {found.minutes:g} minutes at {found.rate:.1f} requests a second, "
        f"{found.rate / found.capacity:.0%} of the rate that clients without pauses reach "
        f"({found.capacity:.1f}). Memory is the unique set size, its growth that of a fitted line "
        f"without the first {_WARM_UP_SHARE:.0%} of the time. The second table counts requests by "
        "kind and status; *left*: the client hung up."
    )
    failures = (
        "; ".join(found.failures())
        or f"no process grew by more than {GROWTH_LIMIT:.0%}, "
        "and no request, block or stream was left"
    )
    return "\n\n".join(
        [
            words,
            table(head, rows),
            table(["kind of request: status", "requests"], outcomes),
            f"Result: {failures}.",
        ]
    )


def plot(found: Found) -> str:
    """Memory of every process over time."""
    lines = [
        Line(p.name, tuple(zip((t / 60 for t in p.times_s), p.memory_mb, strict=True)))
        for p in found.processes
    ]
    return line_chart(lines, x="minutes", y="unique memory, MiB")


def run(minutes: float, share: float) -> Found:
    """A server of its own, for the length of the run."""
    with (
        tempfile.TemporaryDirectory(prefix="em") as folder,
        running_server(Path(folder)) as server,
    ):
        return asyncio.run(soak(server, minutes, share))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.long.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--share", type=float, default=0.8, help="of the capacity")
    parser.add_argument("--plot", type=Path, help="SVG file of the memory over time")
    parser.add_argument("--json", type=Path, help="file of everything that was read")
    options = parser.parse_args(arguments)
    found = run(options.minutes, options.share)
    sys.stdout.write(f"{report(found)}\n")
    if options.plot:
        options.plot.write_text(plot(found))
    if options.json:
        seen = [
            {"name": p.name, "t": p.times_s, "mib": p.memory_mb, "fds": p.descriptors}
            for p in found.processes
        ]
        options.json.write_text(json.dumps(seen))
    sys.exit(1 if found.failures() else 0)


if __name__ == "__main__":
    main()
