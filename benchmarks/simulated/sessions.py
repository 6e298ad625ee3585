"""Simulated sessions on several workers: KV tiers below the pool, and the routing policies.

python -m benchmarks.run --only sessions

Each of 4 simulated workers computes one prompt at a time with 8,000 prompt tokens a second;
decoding costs nothing. All pools together hold 10% of the different blocks of the trace, host
memories 25% and disks 50%; each worker has a fourth of each. A worker reads 100,000 prompt tokens a
second from host memory or from another worker, and 24,000 from disk (12 and 3 GB/s at 128 KiB a
token), while it computes other prompts. Routing, eviction and tiers are the product's own code.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report.results import table
from benchmarks.report.svg import Line, line_chart
from benchmarks.simulated.agent_trace import agent_sessions
from benchmarks.simulated.request_trace import BLOCK_TOKENS, TracedRequest, conversations
from benchmarks.simulated.retention import Cache, TierCache, Use, ideal_blocks, uses_of, working_set
from benchmarks.simulated.routing import FETCHED_PER_S, TOKENS_PER_S, Reports
from gateway.engines.kv_index import KvIndex
from gateway.engines.router import (
    FETCH_TOKENS,
    Route,
    RoutingPolicy,
    WorkerLoad,
    pick_worker,
    route_by_kv,
)
from workers.kv.turns import KeepHints

NUM_WORKERS = 4
"""Workers of the model."""
POOL_PART = 0.1
"""Fraction of the working set that all pools together hold."""
PLOT = Path(__file__).resolve().parents[2] / "docs" / "explanation" / "sessions.svg"
"""The plot of times to the first token by percentile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TierSize:
    """A tier below the pool."""

    part: float
    """Fraction of the working set that the tier holds at all workers together."""
    tokens_per_s: float
    """Prompt tokens that a worker reads from the tier in a second."""


HOST = TierSize(part=0.25, tokens_per_s=FETCHED_PER_S)
"""Host memory."""
DISK = TierSize(part=0.5, tokens_per_s=24_000.0)
"""A local disk."""


@dataclass(frozen=True, slots=True)
class LowerTier:
    """One tier below a worker's pool. It has copies of the pool's blocks, and more blocks."""

    cache: TierCache
    tokens_per_s: float
    """Prompt tokens that are read from the tier in a second."""


class Worker:
    """One attention worker: a queue of prompts, a pool, and tiers below it."""

    def __init__(
        self, name: str, index: KvIndex, num_blocks: int, tiers: Sequence[LowerTier]
    ) -> None:
        self.load = WorkerLoad(name=name, fetch_cost=TOKENS_PER_S / FETCHED_PER_S)
        """Load as the router sees it."""
        self.reports = Reports(name, index)
        self._free_s = 0.0
        self._pool = Cache(num_blocks)
        self._tiers = tiers

    def wait_s(self, now_s: float) -> float:
        """Seconds until the worker starts a prompt that arrives now."""
        return max(self._free_s - now_s, 0.0)

    def num_held(self, names: Sequence[bytes]) -> int:
        """Number of leading blocks of a prompt that any tier holds."""
        first = self._pool.num_found(names)
        return next((i for i, n in enumerate(names[first:], first) if not self._has(n)), len(names))

    def take(
        self, use: Use, hints: KeepHints, tokens: int, now_s: float, num_fetched: int = 0
    ) -> tuple[float, int]:
        """Compute a prompt, of which the first ``num_fetched`` blocks may come from a peer: seconds
        to its first token, and tokens that were not computed.
        """
        names = use.names
        took_s, num_here = self._restore_s(names)
        if num_fetched > num_here:
            fetched = (num_fetched - num_here) * BLOCK_TOKENS
            took_s += FETCH_TOKENS / TOKENS_PER_S + fetched / FETCHED_PER_S
        cached = max(num_here, num_fetched) * BLOCK_TOKENS
        ttft_s = max(self.wait_s(now_s), took_s) + (tokens - cached) / TOKENS_PER_S
        self._free_s = now_s + ttft_s
        self._keep(use, hints)
        return ttft_s, cached

    def _restore_s(self, names: Sequence[bytes]) -> tuple[float, int]:
        """Seconds in which all blocks that are here come into the pool, and how many these are."""
        took_s, place = 0.0, self._pool.num_found(names)
        for name in names[place:]:
            tier = next((tier for tier in self._tiers if tier.cache.has(name)), None)
            if tier is None and not self._pool.has(name):
                break
            took_s += BLOCK_TOKENS / tier.tokens_per_s if tier is not None else 0.0
            place += 1
        return took_s, place

    def _keep(self, use: Use, hints: KeepHints) -> None:
        stored = [name for name in use.names if not self._has(name)]
        self._pool.serve(use, hints)
        gone = set(self._pool.gone)
        for tier in self._tiers:
            tier.cache.serve(use, hints)
            gone.update(tier.cache.gone)
        removed = {name for name in gone if not self._has(name)}
        self.reports.add(self._free_s, use.names, stored, removed)

    def _has(self, name: bytes) -> bool:
        return self._pool.has(name) or any(tier.cache.has(name) for tier in self._tiers)


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """Routing policy and lower tiers of a simulated cluster."""

    policy: RoutingPolicy
    tiers: Sequence[TierSize] = ()


SYSTEMS = {
    "round-robin, pool": System(policy=RoutingPolicy.ROUND_ROBIN),
    "round-robin, all tiers": System(policy=RoutingPolicy.ROUND_ROBIN, tiers=(HOST, DISK)),
    "`kv`, pool": System(policy=RoutingPolicy.KV),
    "`kv`, pool and host": System(policy=RoutingPolicy.KV, tiers=(HOST,)),
    "`kv`, all tiers": System(policy=RoutingPolicy.KV, tiers=(HOST, DISK)),
}
"""Label in the table -> system."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Results of a replay."""

    num_cached: int
    """Number of blocks that were not computed."""
    ttft_s: Sequence[float]
    """Time to the first token of each request."""


def replay(requests: Sequence[TracedRequest], system: System) -> Outcome:
    """Route all requests. Sessions are named; nobody says which turn is the last one."""
    index, uses = KvIndex(), uses_of(requests)
    workers = _workers(system, index, working_set(uses) / NUM_WORKERS)
    loads = [worker.load for worker in workers.values()]
    homes: dict[str, str] = {}
    times, num_cached = list[float](), 0
    for number, (request, use) in enumerate(zip(requests, uses, strict=True)):
        for worker in workers.values():
            worker.reports.tell(use.time_s)
            worker.load.queued_tokens = worker.wait_s(use.time_s) * TOKENS_PER_S
        home, tokens = homes.get(use.session, ""), request.prompt_tokens
        if system.policy is RoutingPolicy.KV:
            route = route_by_kv(index, use.names, loads, number, tokens, BLOCK_TOKENS, home)
        else:
            route = pick_worker(loads, system.policy, number)
        index.expect(route.load.name, use.names)
        took_s, cached = _serve(workers, route, use, tokens)
        times.append(took_s)
        num_cached += cached // BLOCK_TOKENS
        if use.session:
            homes[use.session] = route.load.name
    return Outcome(num_cached=num_cached, ttft_s=times)


def _workers(system: System, index: KvIndex, part: float) -> dict[str, Worker]:
    """Return the workers. The tiers of each are sized for a working set of ``part`` blocks."""
    return {
        f"w{number}": Worker(
            f"w{number}",
            index,
            int(part * POOL_PART),
            [
                LowerTier(TierCache(int(part * tier.part)), tier.tokens_per_s)
                for tier in system.tiers
            ],
        )
        for number in range(NUM_WORKERS)
    }


def _serve(workers: Mapping[str, Worker], route: Route, use: Use, tokens: int) -> tuple[float, int]:
    """Serve a request; returns seconds to the first token and tokens that were not computed."""
    peer = workers.get(route.peer)
    num_fetched = 0 if peer is None else peer.num_held(use.names)
    hints = KeepHints(session=use.session)
    return workers[route.load.name].take(use, hints, tokens, use.time_s, num_fetched)


def section(quick: bool) -> str:
    """Return the Markdown section; draws ``PLOT``."""
    rows, lines = [], list[Line]()
    traces: dict[str, Sequence[TracedRequest]] = {
        "agents": agent_sessions(1, 3 if quick else 50),
        "conversations": conversations()[: 200 if quick else None],
    }
    for trace, requests in traces.items():
        uses = uses_of(requests)
        ideal = ideal_blocks(uses, int(working_set(uses) * DISK.part))
        for name, system in SYSTEMS.items():
            outcome = replay(requests, system)
            rows.append([f"{trace}: {name}", *_cells(outcome, ideal, requests)])
            if trace == "conversations" and system.policy is RoutingPolicy.KV:
                lines.append(Line(name.replace("`", ""), _shares(outcome)))
    if not quick:
        PLOT.write_text(line_chart(lines, x="% of requests", y="seconds to the first token"))
    head = ["trace: system", "cached tokens", "ratio to the ideal", "mean TTFT, s", "TTFT, p90, s"]
    return "\n\n".join(
        [
            "## Sessions, simulated",
            " ".join((__doc__ or "").split("\n\n", 2)[2].split()),
            "The agents are 50 sessions as in *Retention, simulated*. Requests name their sessions "
            "and send no other hint. The ideal is one cache for all workers with Belady's order "
            f"that holds {DISK.part:.0%}. If the workers must compute more tokens than they can, "
            "queues grow until the end of the trace: these rows have TTFT of minutes and hours. "
            "[The plot](../explanation/sessions.svg) shows the conversations.",
            table(head, rows),
        ]
    )


def _cells(outcome: Outcome, ideal: int, requests: Sequence[TracedRequest]) -> list[str]:
    tokens = sum(request.prompt_tokens for request in requests)
    return [
        f"{outcome.num_cached * BLOCK_TOKENS / tokens:.3f}",
        f"{outcome.num_cached / ideal:.3f}",
        f"{statistics.fmean(outcome.ttft_s):.2f}",
        f"{statistics.quantiles(outcome.ttft_s, n=10)[8]:.2f}",
    ]


def _shares(outcome: Outcome) -> tuple[tuple[float, float], ...]:
    """Points (percentile of the requests, time to the first token) of a line in the plot."""
    points = statistics.quantiles(outcome.ttft_s, n=100)
    return tuple((float(place), points[place - 1]) for place in range(1, 96))
