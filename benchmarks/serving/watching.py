"""Cost of monitoring: ``python -m benchmarks.run --only watching``.

A served cluster decodes for clients that never stop. Scrapers of ``/metrics`` and open dashboard
pages observe it in short turns, so that other work on the machine affects all turns alike. The
speed in a turn is compared with the turns without an observer before and after it. The CPU time of
one monitoring request in all processes shows the same cost with less noise.
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
"""Target: the largest fraction of the throughput that an observer may cost."""
_BODY = {"prompt": "ROMEO:", "max_tokens": 1000, "ignore_eos": True, "stream": True}
_RAMP_S = 3.0
"""Time before the first turn, until all clients decode."""


@dataclass(frozen=True, slots=True)
class Watcher:
    """Requests paths, each at an interval in seconds."""

    name: str
    paths: Sequence[tuple[str, float]] = ()


NOBODY = Watcher("none")
PAGE = (
    ("/dashboard/api/state", 1.0),
    ("/dashboard/api/history?after=99999999999", 2.0),
    ("/dashboard/api/load?bank=0", 3.0),
)
"""Requests of ``gateway/dashboard/static/main.js`` while its tab is visible."""
WATCHERS = (
    Watcher("1 scraper, every second", [("/metrics", 1.0)]),
    Watcher("4 scrapers, every second", [("/metrics", 1.0)] * 4),
    Watcher("1 open dashboard page", PAGE),
    Watcher("4 open dashboard pages", [*PAGE] * 4),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Sizes of the measurement."""

    num_streams: int = 8
    turn_s: float = 5.0
    num_rounds: int = 12
    """Turns of each observer."""
    num_questions: int = 200
    """Sequential requests of each path."""


QUICK = Size(num_streams=2, turn_s=1.0, num_rounds=1, num_questions=5)


class Load:
    """Streams that restart when they end; counts their events."""

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
        """End the streams and close the client."""
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
    """Run one turn; returns events a second."""
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
    """Each observer's speed ratio by turn; without an observer, events a second by turn."""
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
    """CPU time in ms of one request in all processes, without what they use when idle."""
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
    """Return the Markdown section for these results."""
    rows = [["none", f"{statistics.median(found[NOBODY.name]):.0f} tokens/s", "", ""]]
    for watcher in WATCHERS:
        ratios = sorted(found[watcher.name])
        low, high = ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]
        target = f"at least {1 - MOST_COST:g}"
        rows.append(
            [watcher.name, f"{statistics.median(ratios):.3f}", f"{low:.3f} to {high:.3f}", target]
        )
    return (
        "## Cost of monitoring\n\n"
        "1 attention and 2 expert workers serve the bundled model through a gateway to "
        f"{size.num_streams} HTTP streams that never stop; clients and observers run on the same "
        f"machine. Each observer has {size.num_rounds} turns of {size.turn_s:g} s. The speed of "
        "the streams in its turn is divided by their mean speed in the turns without an observer "
        "before and after this turn. The last columns are the quartiles of the turns and the "
        "target for the median.\n\n"
        f"{table(['observer', 'speed ratio, median', 'quartiles', 'target'], rows)}\n\n"
        f"CPU time of one request in all processes, mean of {size.num_questions} requests without "
        "other load. A request of 10 ms every second takes 1% of a core.\n\n"
        f"{table(['request', 'ms'], [[path, f'{ms:.1f}'] for path, ms in costs_ms.items()])}"
    )


def section(quick: bool) -> str:
    """Return the Markdown section."""
    size = QUICK if quick else Size()
    with tempfile.TemporaryDirectory() as text, running_server(Path(text)) as server:
        paths = dict.fromkeys(path for watcher in WATCHERS for path, _ in watcher.paths)
        costs_ms = {path: cpu_ms(server, path, size.num_questions) for path in paths}
        return report(asyncio.run(measure(server.http, size)), costs_ms, size)
