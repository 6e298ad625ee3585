"""Faults and orders at random under mixed traffic, and whether any client notices.

python -m benchmarks.chaos [--seed 1] [--minutes 10] [--every 5]

``expertmesh serve`` with the bundled model, 2 attention and 2 expert workers, 2 gateways. Clients
ask over HTTP and gRPC for answers that are known from before the first fault: whole ones and
streams, several choices, grammars, penalties; some leave, some have a deadline, some read slowly.
Meanwhile workers, the controller and gateways are killed, workers are stopped for seconds, and the
cluster is scaled, drained and rebalanced. One seed decides the faults and the requests.

A whole answer must equal the known one, and a broken one must be its beginning. A stream may break
where a gateway was killed, and only there. Ends with status 1 where that does not hold, or where
something is left afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil

from benchmarks.results import table
from cluster.launch.orphans import find_by_files
from protos.inference_pb2 import GenerateRequest
from protos.inference_pb2_grpc import InferenceStub
from protos.types_pb2 import SamplingParams
from tests.served.server import Served, running_server

_NUM_CALLS = 24
"""Different calls, whose answers are known."""
_NUM_CLIENTS = 8
_LIMIT_S = 120.0
_STOP_S = (0.5, 4.0)
"""Shortest and longest time for which a worker is stopped."""
_MOST_WORKERS = 3
"""Of each role, that a scaling asks for."""
_CALM_S = 90.0
"""Time after the last fault in which the cluster must be whole."""
_GATEWAY_S = 20.0
"""Time after the kill of a gateway in which streams may break, and calls be refused."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request."""

    body: dict[str, Any]
    """Of ``/v1/completions``."""

    def grpc_request(self) -> GenerateRequest:
        """The same over gRPC, where that is as plain."""
        params = SamplingParams(
            max_tokens=self.body["max_tokens"],
            temperature=self.body["temperature"],
            seed=self.body["seed"],
            ignore_eos=True,
        )
        return GenerateRequest(text=self.body["prompt"], sampling_params=params)

    @property
    def is_plain(self) -> bool:
        """One choice without anything that differs between the protocols."""
        return set(self.body) == {"prompt", "max_tokens", "temperature", "seed", "ignore_eos"}


@dataclass(slots=True)
class Seen:
    """What the clients saw."""

    outcomes: Counter[str] = field(default_factory=Counter)
    """By kind of request and its outcome."""
    wrong: list[str] = field(default_factory=list)
    """Answers that differ, and calls that failed without a reason."""
    pauses_ms: list[float] = field(default_factory=list)
    """Longest time between two events of each stream."""
    gateway_killed_at: float = float("-inf")
    """Monotonic time of the last kill of a gateway."""

    def check(self, kind: str, call: Call, texts: Sequence[str], known: Sequence[str]) -> None:
        """A whole answer."""
        self.outcomes[f"{kind}: whole"] += 1
        if list(texts) != list(known):
            self.wrong.append(f"{kind} {json.dumps(call.body)}: {texts!r}, not {known!r}")

    def check_begun(self, kind: str, how: str, text: str, known: str) -> None:
        """The beginning of an answer."""
        self.outcomes[f"{kind}: {how}"] += 1
        if not known.startswith(text):
            self.wrong.append(f"{kind} {how}: {text!r} is no beginning of {known!r}")

    def broke(self, kind: str, why: str) -> None:
        """A call failed; only the kill of a gateway is a reason."""
        if time.monotonic() - self.gateway_killed_at < _GATEWAY_S:
            self.outcomes[f"{kind}: lost with its gateway"] += 1
        else:
            self.outcomes[f"{kind}: failed"] += 1
            self.wrong.append(f"{kind}: {why}"[:300])


class Clients:
    """They ask again and again."""

    def __init__(self, server: Served, draw: random.Random) -> None:
        self.seen = Seen()
        self.calls = [Call(_draw_body(draw, number)) for number in range(_NUM_CALLS)]
        self._known: dict[int, list[str]] = {}
        self._draw = draw
        self._http = httpx.AsyncClient(
            base_url=server.http, timeout=_LIMIT_S, limits=httpx.Limits(max_connections=None)
        )
        self._channel = grpc.aio.insecure_channel(server.grpc)
        self._stub = InferenceStub(self._channel)
        self._kinds: Sequence[tuple[float, Callable[[int], Awaitable[None]]]] = (
            (0.35, self._whole),
            (0.25, self._stream),
            (0.15, self._grpc),
            (0.10, self._leave),
            (0.05, self._deadline),
            (0.10, self._read_slowly),
        )

    async def learn(self) -> None:
        """Ask for every answer once, while nothing happens."""
        for number, call in enumerate(self.calls):
            answer = await self._post(call)
            answer.raise_for_status()
            self._known[number] = [c["text"] for c in answer.json()["choices"]]

    async def run(self, until: Callable[[], bool]) -> None:
        """All clients, until it is so."""

        async def client() -> None:
            while not until():
                weights = [weight for weight, _ in self._kinds]
                ((_, ask),) = self._draw.choices(self._kinds, weights)
                name = ask.__name__.strip("_")
                try:
                    await ask(self._draw.randrange(_NUM_CALLS))
                except (httpx.HTTPError, grpc.aio.AioRpcError) as err:
                    self.seen.broke(name, f"{type(err).__name__} {err}")
                    await asyncio.sleep(0.5)

        await asyncio.gather(*(client() for _ in range(_NUM_CLIENTS)))

    async def close(self) -> None:
        """End all connections."""
        await self._http.aclose()
        await self._channel.close(None)

    async def _post(self, call: Call) -> httpx.Response:
        return await self._http.post("/v1/completions", json=call.body)

    async def _whole(self, number: int) -> None:
        call = self.calls[number]
        answer = await self._post(call)
        if answer.status_code != 200:
            self.seen.broke("whole", f"{answer.status_code} {answer.text}")
            return
        texts = [choice["text"] for choice in answer.json()["choices"]]
        self.seen.check("whole", call, texts, self._known[number])

    async def _stream(self, number: int) -> None:
        await self._read("stream", number)

    async def _leave(self, number: int) -> None:
        await self._read("leave", number, leave_after=self._draw.randint(1, 30))

    async def _read_slowly(self, number: int) -> None:
        await self._read("slow reader", number, pause_s=0.05)

    async def _read(
        self, kind: str, number: int, leave_after: int | None = None, pause_s: float = 0.0
    ) -> None:
        call, known = self.calls[number], self._known[number]
        texts, times = [""] * len(known), list[float]()
        body = {**call.body, "stream": True}
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        self._note_pause(times)
                        self.seen.check(kind, call, texts, known)
                        return
                    if not line.startswith("data: "):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event or response.status_code != 200:
                        self.seen.broke(kind, line)
                        return
                    for choice in event["choices"]:
                        texts[choice["index"]] += choice["text"]
                    times.append(time.monotonic())
                    if leave_after is not None and len(times) >= leave_after:
                        self.seen.check_begun(kind, "left", texts[0], known[0])
                        return
                    await asyncio.sleep(pause_s)
        finally:
            for text, whole in zip(texts, known, strict=True):
                if not whole.startswith(text):
                    self.seen.wrong.append(f"{kind}: {text!r} is no beginning of {whole!r}")
        self.seen.broke(kind, "the stream ended without an end")

    async def _grpc(self, number: int) -> None:
        plain = [n for n, call in enumerate(self.calls) if call.is_plain]
        number = plain[number % len(plain)]
        call, text, times = self.calls[number], "", list[float]()
        async for part in self._stub.GenerateStream(call.grpc_request(), timeout=_LIMIT_S):
            text += part.text
            times.append(time.monotonic())
        self._note_pause(times)
        self.seen.check("grpc", call, [text], self._known[number])

    async def _deadline(self, number: int) -> None:
        """A limit that may be too short."""
        limit = {"x-request-timeout-ms": str(self._draw.randint(50, 500))}
        body = self.calls[number].body
        answer = await self._http.post("/v1/completions", json=body, headers=limit)
        how = "whole" if answer.status_code == 200 else "over"
        if answer.status_code in (200, 504):
            self.seen.outcomes[f"deadline: {how}"] += 1
        else:
            self.seen.broke("deadline", f"{answer.status_code} {answer.text}")

    def _note_pause(self, times: Sequence[float]) -> None:
        if len(times) > 1:
            self.seen.pauses_ms.append(1000 * max(b - a for a, b in pairwise(times)))


def _draw_body(draw: random.Random, number: int) -> dict[str, Any]:
    words = draw.choices(("the", "king", "of", "love", "and", "no", "more", "sword"), k=40)
    body: dict[str, Any] = {
        "prompt": f"{number} {' '.join(words[: draw.randint(1, 40)])}",
        "max_tokens": draw.randint(40, 300),
        "temperature": draw.choice((0.0, 0.7, 1.0)),
        "seed": draw.randrange(10**6),
        "ignore_eos": True,
    }
    extra = number % 6
    if extra == 0:
        body |= {"n": 2, "frequency_penalty": 0.5}
    elif extra == 1:
        body["structured_outputs"] = {"regex": "([a-z]{3,9} ){99}"}
    elif extra == 2:
        body["repetition_penalty"] = 1.2
    return body


class Chaos:
    """What happens to the cluster."""

    def __init__(self, server: Served, draw: random.Random, seen: Seen) -> None:
        self._server, self._draw, self._seen = server, draw, seen
        self.done: Counter[str] = Counter()
        """By fault or order, and how it ended."""
        self._faults: Sequence[tuple[int, Callable[[], None]]] = (
            (3, self._kill_worker),
            (2, self._stop_worker),
            (1, self._kill_controller),
            (1, self._kill_gateway),
            (4, self._scale),
            (2, self._drain),
            (2, self._rebalance),
        )

    def one(self) -> None:
        """A fault or an order, drawn by lot; one that finds nothing to hit is left out."""
        ((_, fault),) = self._draw.choices(self._faults, [w for w, _ in self._faults])
        try:
            fault()
        except (httpx.HTTPError, psutil.Error, ProcessLookupError, AssertionError, IndexError):
            self.done[f"{fault.__name__.strip('_')}: nothing to hit"] += 1

    def snapshot(self) -> dict[str, Any]:
        """The status, by any gateway."""
        return self._server.status()

    def _workers(self) -> list[dict[str, Any]]:
        return [w for w in self.snapshot()["workers"] if w["state"] == "SERVING"]

    def _kill_worker(self) -> None:
        worker = self._draw.choice(self._workers())
        os.kill(worker["pid"], signal.SIGKILL)
        self.done[f"kill -9 of {worker['role']} worker"] += 1

    def _stop_worker(self) -> None:
        worker = self._draw.choice(self._workers())
        os.kill(worker["pid"], signal.SIGSTOP)
        seconds = self._draw.uniform(*_STOP_S)
        self.done[f"SIGSTOP of {worker['role']} worker"] += 1
        time.sleep(seconds)
        with suppress(ProcessLookupError):
            os.kill(worker["pid"], signal.SIGCONT)

    def _kill_controller(self) -> None:
        os.kill(self._server.pid_of("ControllerActor"), signal.SIGKILL)
        self.done["kill -9 of the controller"] += 1

    def _kill_gateway(self) -> None:
        pids = [
            p.pid
            for p in find_by_files(self._server.folder)
            if "".join(psutil.Process(p.pid).cmdline()[:1]).startswith("ray::ServeReplica")
        ]
        self._seen.gateway_killed_at = time.monotonic()
        os.kill(self._draw.choice(pids), signal.SIGKILL)
        self.done["kill -9 of a gateway"] += 1

    def _order(self, what: str, body: dict[str, Any]) -> None:
        """Give an order to a gateway's admin port; its end is looked up at the end."""
        gateways = [g for g in self.snapshot()["gateway"] if g.get("admin_http")]
        url = f"http://{self._draw.choice(gateways)['admin_http']}/admin/v1/{what}"
        answer = httpx.post(url, json=body, timeout=10.0)
        how = "ordered" if answer.status_code == 200 else f"refused ({answer.status_code})"
        self.done[f"{what}: {how}"] += 1

    def _scale(self) -> None:
        counts = {
            role: self._draw.randint(1, _MOST_WORKERS)
            for role in self._draw.choice((("attention",), ("expert",), ("attention", "expert")))
        }
        self._order("scale", {**counts, "deadline_s": 60})

    def _drain(self) -> None:
        worker = self._draw.choice(self._workers())
        self._order("drain", {"worker": worker["name"], "deadline_s": 60})

    def _rebalance(self) -> None:
        self._order("rebalance", {})


async def run(server: Served, seed: int, minutes: float, every_s: float) -> list[str]:
    """Learn the answers, then let faults happen under load.

    Returns the lines of the report; the last one begins with ``Result``.
    """
    draw = random.Random(seed)
    clients = Clients(server, random.Random(seed + 1))
    await clients.learn()
    chaos = Chaos(server, draw, clients.seen)
    end = time.monotonic() + 60.0 * minutes
    load = asyncio.create_task(clients.run(lambda: time.monotonic() >= end))
    while time.monotonic() < end - every_s:
        await asyncio.sleep(draw.expovariate(1.0 / every_s))
        await asyncio.to_thread(chaos.one)
    await load
    left = await asyncio.to_thread(_wait_calm, chaos)
    operations = await asyncio.to_thread(_operations, chaos)
    await clients.close()
    return _report(clients.seen, chaos, operations, left)


def _wait_calm(chaos: Chaos) -> list[str]:
    """Wait until the cluster is whole and idle; what it lacks at the end of the time."""
    give_up, lacking = time.monotonic() + _CALM_S, ["no gateway answers"]
    while time.monotonic() < give_up:
        with suppress(httpx.HTTPError, AssertionError):
            snapshot = chaos.snapshot()
            workers = [w for w in snapshot["workers"] if w["state"] == "SERVING"]
            held = [
                f"{w['name']} holds {w['kv_blocks_total'] - w['kv_blocks_free']} KV blocks"
                for w in workers
                if w["kv_blocks_total"] and w["kv_blocks_free"] != w["kv_blocks_total"]
            ]
            state = [] if snapshot["state"] == "SERVING" else [f"the state is {snapshot['state']}"]
            if not (lacking := held + state):
                return []
        time.sleep(0.5)
    return lacking


def _operations(chaos: Chaos) -> Counter[str]:
    """How the last operations have ended."""
    (gateway, *_) = [g for g in chaos.snapshot()["gateway"] if g.get("admin_http")]
    url = f"http://{gateway['admin_http']}/admin/v1/operations"
    found = httpx.get(url, timeout=10.0).json()["operations"]
    return Counter(f"{o['kind']} {o['state']}" for o in found)


def _report(seen: Seen, chaos: Chaos, operations: Counter[str], left: Sequence[str]) -> list[str]:
    pauses = sorted(seen.pauses_ms) or [0.0]
    share = [pauses[min(int(q * len(pauses)), len(pauses) - 1)] for q in (0.5, 0.9, 0.99)]
    rows = [[name, str(count)] for name, count in sorted(seen.outcomes.items())]
    faults = [[name, str(count)] for name, count in sorted(chaos.done.items())]
    ends = ", ".join(f"{count} {name}" for name, count in sorted(operations.items()))
    lost = sum(n for name, n in seen.outcomes.items() if name.endswith("failed"))
    wrong = [*seen.wrong, *left]
    return [
        table(["requests", "number"], rows),
        table(["faults and orders", "number"], faults),
        f"Operations that are remembered: {ends}.",
        f"Longest pause of a stream in ms, of {len(pauses)} streams: median {share[0]:.0f}, "
        f"90% {share[1]:.0f}, 99% {share[2]:.0f}, longest {pauses[-1]:.0f}, "
        f"mean {statistics.mean(pauses):.0f}.",
        *wrong[:20],
        f"Result: {seen.outcomes.total()} requests, {lost} lost, "
        f"{len(seen.wrong) - lost} altered, {len(left)} things left.",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 where anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=5.0, help="mean seconds between two faults")
    options = parser.parse_args(arguments)
    workers = ("--num-attention-workers", "2", "--num-expert-workers", "2")
    more = ("--num-redundant-experts", "8", "--num-gateway-replicas", "2")
    with (
        tempfile.TemporaryDirectory(prefix="em") as folder,
        running_server(Path(folder), *workers, *more) as server,
    ):
        lines = asyncio.run(run(server, options.seed, options.minutes, options.every))
    sys.stdout.write("\n\n".join(lines) + "\n")
    return 0 if lines[-1].endswith(" 0 lost, 0 altered, 0 things left.") else 1


if __name__ == "__main__":
    sys.exit(main())
