"""What ``bench`` reports, beside what a server with fixed delays really did.

Client and server talk over real sockets in one event loop, whose clock moves only while both wait:
a machine that stands still delays neither.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import selectors
from itertools import pairwise
from statistics import mean, quantiles

import pytest
from aiohttp import web

from cluster.cli.bench.http_target import HttpTarget
from cluster.cli.bench.workload import Workload, run_workload
from cluster.cli.terminal.client import Client
from cluster.workload.arrivals import poisson
from cluster.workload.tally import Tally

WITHIN = 0.02
FIRST_S, GAP_S, TOKENS = 0.3, 0.15, 6
_REAL_S = 0.002
"""Longer than loopback takes to bring what one side has sent to the other."""
NUM_REQUESTS, RATE_PER_S = 40, 40.0


class _Waiting(selectors.DefaultSelector):
    """Where nothing comes, the time until the next timer has passed at once."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(timeout if timeout is None else min(timeout, _REAL_S))
        if not found and timeout:
            self.now_s += timeout
        return found


class WaitingLoop(asyncio.SelectorEventLoop):
    """Its clock moves only while it waits."""

    def __init__(self) -> None:
        self._waiting = _Waiting()
        super().__init__(self._waiting)

    def time(self) -> float:
        return self._waiting.now_s


def run(server: ScriptedServer) -> Tally:
    with asyncio.Runner(loop_factory=WaitingLoop) as runner:
        return runner.run(measure(server))


class ScriptedServer:
    """Streams answers with fixed delays, and writes down when it did what."""

    def __init__(self) -> None:
        self.received: list[float] = []
        self.sent: list[list[float]] = []
        """Times of the pieces, by request."""

    async def complete(self, request: web.Request) -> web.StreamResponse:
        clock = asyncio.get_running_loop().time
        self.received.append(clock())
        times: list[float] = []
        self.sent.append(times)
        await request.read()
        answer = web.StreamResponse()
        await answer.prepare(request)
        for place in range(TOKENS):
            await asyncio.sleep(GAP_S if place else FIRST_S)
            reason = "length" if place == TOKENS - 1 else None
            choice = {"text": "x", "finish_reason": reason}
            event = {"choices": [choice], "usage": {"completion_tokens": place + 1}}
            times.append(clock())
            await answer.write(f"data: {json.dumps(event)}\n\n".encode())
        await answer.write(b"data: [DONE]\n\n")
        return answer

    def really_ms(self) -> dict[str, list[float]]:
        """Milliseconds by measure."""
        both = list(zip(self.received, self.sent, strict=True))
        return {
            "ttft": [1e3 * (times[0] - begin) for begin, times in both],
            "e2e": [1e3 * (times[-1] - begin) for begin, times in both],
            "tpot": [1e3 * (times[-1] - times[0]) / (TOKENS - 1) for _, times in both],
            "itl": [1e3 * (b - a) for _, t in both for a, b in pairwise(t)],
        }


async def measure(server: ScriptedServer) -> Tally:
    app = web.Application()
    app.router.add_post("/v1/completions", server.complete)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    names = ("timeout", "api_key", "admin_key")
    client = Client(argparse.Namespace(url=f"http://{host}:{port}", **dict.fromkeys(names)))
    target = HttpTarget(client, None, "salt")
    tally = Tally({})
    load = Workload(
        arrivals=poisson(NUM_REQUESTS, RATE_PER_S, 8, TOKENS, seed=1),
        max_concurrency=None,
        vocab_size=100,
        seed=1,
        timeout_s=60.0,
    )
    try:
        await run_workload(load, target, tally, lambda: None)
    finally:
        await target.close()
        await runner.cleanup()
    return tally


def test_its_numbers_are_those_of_the_server() -> None:
    server = ScriptedServer()
    tally = run(server)
    span_s = max(times[-1] for times in server.sent) - min(server.received)
    results = tally.results(span_s)
    assert (results["successful"], results["output_tokens"]) == (
        NUM_REQUESTS,
        NUM_REQUESTS * TOKENS,
    )
    for name, really in server.really_ms().items():
        cuts = quantiles(really, n=100, method="inclusive")
        expected = {"mean": mean(really), "median": cuts[49], "p90": cuts[89]}
        found = {key: results[f"{name}_ms"][key] for key in expected}
        assert found == pytest.approx(expected, rel=WITHIN), name


def test_no_request_waits_for_another() -> None:
    """An open loop: all 40 are under way before the first one ends."""
    server = ScriptedServer()
    tally = run(server)
    before_the_first_end = sum(begin < server.sent[0][-1] for begin in server.received)
    assert tally.peak_in_flight >= before_the_first_end > 20
