"""What it costs to be watched: ``python -m benchmarks.run --only watching``.

A served cluster decodes for clients that never stop, and is watched in turns: by nobody, by
scrapers of ``/metrics``, by an open page. Turns are short and alternate, so that what else the
machine does meets all of them; a turn's speed is compared with the turns of nobody beside it. What
one question costs all processes in CPU time says the same with less noise.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from benchmarks.harness.server import WAIT_S, Served, running_server
from benchmarks.report.results import table
from cluster.launch.orphans import find_by_files

MOST_COST = 0.01
"""Of the throughput: the target of each watcher."""
_BODY = {"prompt": "ROMEO:", "max_tokens": 1000, "ignore_eos": True, "stream": True}
_RAMP_S = 3.0
"""Until all clients decode, before the first turn."""


@dataclass(frozen=True, slots=True)
class Watcher:
    """Asks for these paths, each so often (seconds)."""

    name: str
    paths: Sequence[tuple[str, float]] = ()


NOBODY = Watcher("nobody")
PAGE = (
    ("/dashboard/api/state", 1.0),
    ("/dashboard/api/history?after=99999999999", 2.0),
    ("/dashboard/api/load?bank=0", 3.0),
)
"""As ``gateway/dashboard/static/main.js`` asks while its tab is in front."""
WATCHERS = (
    Watcher("1 scraper, each second", [("/metrics", 1.0)]),
    Watcher("4 scrapers, each second", [("/metrics", 1.0)] * 4),
    Watcher("1 open page", PAGE),
    Watcher("4 open pages", [*PAGE] * 4),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How long and how often to look."""

    num_streams: int = 8
    turn_s: float = 5.0
    num_rounds: int = 12
    """Of all watchers."""
    num_questions: int = 200
    """Of each path, one after the other."""


QUICK = Size(num_streams=2, turn_s=1.0, num_rounds=1, num_questions=5)


class Load:
    """Streams that begin again when they end; counts events."""

    def __init__(self, url: str, num_streams: int) -> None:
        self.num_events = 0
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.AsyncClient(base_url=url, timeout=WAIT_S, limits=limits)
        self._tasks = [asyncio.create_task(self._stream()) for _ in range(num_streams)]

    async def _stream(self) -> None:
        while True:
            async with self.client.stream("POST", "/v1/completions", json=_BODY) as answer:
                async for line in answer.aiter_lines():
                    self.num_events += line.startswith("data: ")

    async def stop(self) -> None:
        """Leave."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.client.aclose()


async def _ask(client: httpx.AsyncClient, path: str, every_s: float, delay_s: float) -> None:
    await asyncio.sleep(delay_s)
    while True:
        began_s = time.monotonic()
        (await client.get(path)).raise_for_status()
        await asyncio.sleep(max(0.0, every_s - (time.monotonic() - began_s)))


async def _turn(load: Load, watcher: Watcher, turn_s: float) -> float:
    """Events a second while it is watched."""
    asking = [
        asyncio.create_task(_ask(load.client, path, every_s, number / len(watcher.paths)))
        for number, (path, every_s) in enumerate(watcher.paths)
    ]
    began_s, before = time.monotonic(), load.num_events
    await asyncio.sleep(turn_s)
    speed = (load.num_events - before) / (time.monotonic() - began_s)
    for task in asking:
        task.cancel()
    for found in await asyncio.gather(*asking, return_exceptions=True):
        if isinstance(found, Exception):
            raise found
    return speed


async def measure(url: str, size: Size) -> dict[str, list[float]]:
    """By watcher its speed over that of nobody, in each round; nobody's is in events a second."""
    load = Load(url, size.num_streams)
    found: dict[str, list[float]] = {w.name: [] for w in (NOBODY, *WATCHERS)}
    try:
        await asyncio.sleep(_RAMP_S)
        alone = await _turn(load, NOBODY, size.turn_s)
        turns = itertools.chain.from_iterable(itertools.repeat(WATCHERS, size.num_rounds))
        for watcher in turns:
            watched = await _turn(load, watcher, size.turn_s)
            after = await _turn(load, NOBODY, size.turn_s)
            found[watcher.name].append(2 * watched / (alone + after))
            found[NOBODY.name].append(after)
            alone = after
    finally:
        await load.stop()
    return found


def cpu_ms(server: Served, path: str, num_questions: int) -> float:
    """CPU time that one question costs all processes, less what they use anyway."""
    processes = [psutil.Process(found.pid) for found in find_by_files(server.folder)]
    began_s, before_s = time.monotonic(), _cpu_s(processes)
    for _ in range(num_questions):
        server.client.get(path).raise_for_status()
    passed_s, asked_s = time.monotonic() - began_s, _cpu_s(processes)
    time.sleep(passed_s)
    idle_s = _cpu_s(processes) - asked_s
    return (asked_s - before_s - idle_s) / num_questions * 1000


def _cpu_s(processes: Sequence[psutil.Process]) -> float:
    total_s = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # Ray ends idle workers at any time
            times = process.cpu_times()
            total_s += times.user + times.system
    return total_s


def report(found: dict[str, list[float]], costs_ms: dict[str, float], size: Size) -> str:
    """The section."""
    rows = [["nobody", f"{statistics.median(found[NOBODY.name]):.0f} tokens/s", "", ""]]
    for watcher in WATCHERS:
        ratios = sorted(found[watcher.name])
        low, high = ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]
        target = f"at least {1 - MOST_COST:g}"
        rows.append(
            [watcher.name, f"{statistics.median(ratios):.3f}", f"{low:.3f} to {high:.3f}", target]
        )
    return (
        "## Being watched\n\n"
        "1 attention and 2 expert workers with the bundled model, a gateway, and "
        f"{size.num_streams} streams over HTTP that never stop; clients and watchers are on the "
        f"same machine. Turns of {size.turn_s:g} s, {size.num_rounds} of each watcher, each beside "
        "two turns of nobody, with whose mean speed it is compared.\n\n"
        f"{table(['Watched by', 'speed (median)', 'half of the turns', 'target'], rows)}\n\n"
        f"CPU time of all processes for one question, mean of {size.num_questions} while nothing "
        "else is asked; 10 ms each second are 1% of a core.\n\n"
        f"{table(['Question', 'ms'], [[path, f'{ms:.1f}'] for path, ms in costs_ms.items()])}"
    )


def section(quick: bool) -> str:
    """The section of its page."""
    size = QUICK if quick else Size()
    with tempfile.TemporaryDirectory() as text, running_server(Path(text)) as server:
        paths = dict.fromkeys(path for watcher in WATCHERS for path, _ in watcher.paths)
        costs_ms = {path: cpu_ms(server, path, size.num_questions) for path in paths}
        return report(asyncio.run(measure(server.http, size)), costs_ms, size)
