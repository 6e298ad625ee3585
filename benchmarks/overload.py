"""Ten times more requests than can be served: what is accepted, what is refused, and how soon.

python -m benchmarks.overload [--seconds 60]

``expertmesh serve`` with the bundled model and two keys. First the rate that clients without pauses
reach. Then requests arrive at random (Poisson) at ten times that rate. Afterwards one request at a
time again. Then the fairness: a modest key at 0.3 of the capacity, while another one asks for as
much, and then for ten times the capacity.
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
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.processes import name_of
from benchmarks.results import table
from cluster.launch.orphans import find_by_files
from tests.served.server import Served, running_server

GREEDY, MODEST = "greedy", "modest"
OVER = 10.0
"""Times the capacity."""
_NUM_EAGER = 96
"""Clients without pauses, by which the capacity is measured."""
_MODEST_SHARE = 0.3
"""Of the capacity."""
_MAX_TOKENS = 160
_LIMIT_S = 300.0


@dataclass(slots=True)
class Phase:
    """What clients saw for a while."""

    name: str
    seconds: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    num_tokens: int = 0
    """Of answers that came within the time."""
    refused_ms: list[float] = field(default_factory=list)
    """From a request to its refusal."""
    retry_s: list[float] = field(default_factory=list)
    """``Retry-After`` of refusals."""
    ttft_ms: dict[str, list[float]] = field(default_factory=lambda: {GREEDY: [], MODEST: []})
    """By key, from a request to its first token."""

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    def median_ttft_ms(self, key: str) -> float:
        return statistics.median(self.ttft_ms[key] or [float("nan")])


class Clients:
    """They ask under one of two keys."""

    def __init__(self, server: Served, seed: int) -> None:
        self._draw = random.Random(seed)
        self._http = httpx.AsyncClient(
            base_url=server.http, timeout=_LIMIT_S, limits=httpx.Limits(max_connections=None)
        )

    async def close(self) -> None:
        """End all connections."""
        await self._http.aclose()

    async def ask(self, key: str, phase: Phase, end: float) -> None:
        """One stream; its tokens count until ``end`` (monotonic seconds)."""
        body: dict[str, Any] = {
            "prompt": [self._draw.randrange(4, 1000) for _ in range(32)],
            "max_tokens": _MAX_TOKENS,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        began, is_first = time.monotonic(), True
        headers = {"authorization": f"Bearer {key}"}
        post = self._http.stream("POST", "/v1/completions", json=body, headers=headers)
        async with post as response:
            phase.statuses[response.status_code] += 1
            if response.status_code != 200:
                phase.refused_ms.append(1000 * (time.monotonic() - began))
                with suppress(KeyError):
                    phase.retry_s.append(float(response.headers["retry-after"]))
                return
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                now = time.monotonic()
                if is_first:
                    phase.ttft_ms[key].append(1000 * (now - began))
                    is_first = False
                if now < end:
                    event = json.loads(line.removeprefix("data: "))
                    choices = event.get("choices", ())
                    phase.num_tokens += sum(len(c.get("token_ids") or ()) for c in choices)

    async def eager(self, seconds: float) -> Phase:
        """Clients that never wait, for so long."""
        phase = Phase("clients without pauses", seconds)
        end = time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < end:
                await self.ask(GREEDY, phase, end)

        await asyncio.gather(*(client() for _ in range(_NUM_EAGER)))
        return phase

    async def poisson(self, name: str, rates: dict[str, float], seconds: float) -> Phase:
        """Requests at random by key, for so long; then the clients leave."""
        phase, end = Phase(name, seconds), time.monotonic() + seconds
        running: set[asyncio.Task[None]] = set()

        async def arrive(key: str, rate: float) -> None:
            due = time.monotonic()
            while (due := due + self._draw.expovariate(rate)) < end:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                task = asyncio.create_task(self.ask(key, phase, end))
                running.add(task)
                task.add_done_callback(running.discard)

        await asyncio.gather(*(arrive(key, rate) for key, rate in rates.items()))
        left = list(running)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        return phase

    async def one_by_one(self, count: int) -> Phase:
        """Single requests."""
        phase, began = Phase("one at a time"), time.monotonic()
        for _ in range(count):
            await self.ask(MODEST, phase, float("inf"))
        phase.seconds = time.monotonic() - began
        return phase


async def measure(server: Served, seconds: float) -> tuple[list[Phase], float, list[str]]:
    """All phases, the capacity in requests a second, and what memory did."""
    clients = Clients(server, seed=1)
    alone = await clients.one_by_one(8)
    eager = await clients.eager(seconds / 3)
    capacity = eager.tokens_per_s / _MAX_TOKENS
    before = _memory(server)
    over = await clients.poisson("10 x the capacity", {GREEDY: OVER * capacity}, seconds)
    memory = [
        f"{name}: {before[pid][1]:.0f} -> {mib:.0f} MiB"
        for pid, (name, mib) in sorted(_memory(server).items())
        if pid in before and mib > before[pid][1] + 8
    ]
    after = await clients.one_by_one(8)
    rate = _MODEST_SHARE * capacity
    fair = await clients.poisson("0.3 and 0.3", {GREEDY: rate, MODEST: rate}, seconds)
    rates = {GREEDY: OVER * capacity, MODEST: rate}
    unfair = await clients.poisson("10 and 0.3 (modest)", rates, seconds)
    await clients.close()
    return [alone, eager, over, after, fair, unfair], capacity, memory


def _memory(server: Served) -> dict[int, tuple[str, float]]:
    """Process id -> name and unique memory in MiB."""
    found = {}
    for entry in find_by_files(server.folder):
        with suppress(psutil.Error):
            process = psutil.Process(entry.pid)
            found[entry.pid] = name_of(process), process.memory_full_info().uss / 2**20
    return found


def report(phases: Sequence[Phase], capacity: float, memory: Sequence[str]) -> str:
    """A row for each phase."""
    rows = [
        [
            phase.name,
            f"{phase.statuses[200]}",
            f"{phase.statuses.total() - phase.statuses[200]}",
            f"{phase.tokens_per_s:.0f}",
            *(f"{phase.median_ttft_ms(key):.0f}" for key in (GREEDY, MODEST)),
            f"{statistics.median(phase.refused_ms):.0f}" if phase.refused_ms else "-",
            f"{statistics.median(phase.retry_s):.0f}" if phase.retry_s else "-",
        ]
        for phase in phases
    ]
    head = ["requests", "accepted", "refused", "tokens/s"]
    head += [f"TTFT of {key}, ms" for key in (GREEDY, MODEST)]
    head += ["ms to a refusal", "retry after, s"]
    grown = "; ".join(memory) or "no process grew by over 8 MiB"
    return (
        f"The capacity is {capacity:.1f} requests a second of {_MAX_TOKENS} tokens. Medians.\n\n"
        f"{table(head, rows)}\n\nUnder overload: {grown}."
    )


def run(seconds: float) -> str:
    """A server of its own, and the report."""
    with tempfile.TemporaryDirectory(prefix="em") as folder:
        keys = Path(folder) / "keys.json"
        entries = [{"name": n, "key": n, "max_concurrent": 100_000} for n in (GREEDY, MODEST)]
        keys.write_text(json.dumps({"keys": entries}))
        with running_server(Path(folder), "--api-key-file", str(keys)) as server:
            return report(*asyncio.run(measure(server, seconds)))


def section(quick: bool) -> str:
    """The section of ``RESULTS.md``."""
    return f"## Overload\n\n{run(3.0 if quick else 60.0)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overload", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each phase")
    sys.stdout.write(f"{run(parser.parse_args(arguments).seconds)}\n")


if __name__ == "__main__":
    main()
