"""Simulated routing: the gateway's own KV index and policies on traces of a chat service.

python -m benchmarks.run --only routing

Each of 8 simulated workers computes one prompt at a time with 8,000 prompt tokens a second and
caches 2,500 blocks of 512 tokens; decoding costs nothing. The gateway's index lists a prompt's
blocks as expected when the prompt is routed, and as cached when they are computed. With *fetches*,
a worker gets 100,000 prompt tokens a second from a peer that has cached them, while it computes
other prompts. With *eviction across workers*, blocks that a peer has fetched are evicted first, and
the age of a reused block counts half; in the other rows, a worker evicts the least recently used
block.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import deque
from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import groupby

from benchmarks.report.results import table
from benchmarks.simulated.request_trace import (
    BLOCK_TOKENS,
    TracedRequest,
    conversations,
    multi_turn,
)
from gateway.engines.kv_index import KvIndex
from gateway.engines.router import (
    FETCH_TOKENS,
    Route,
    RoutingPolicy,
    WorkerLoad,
    pick_worker,
    route_by_kv,
)
from workers.kv.eviction import EvictionOrder
from workers.kv.reuse_rates import NEW_RATE, USED_RATE
from workers.requests.block_hash import SHORT_BYTES, KvEvents

NUM_WORKERS = 8
"""Workers of the model."""
TOKENS_PER_S = 8000.0
"""Prompt tokens that a worker computes in a second."""
CACHE_BLOCKS = 2500
"""Blocks that a worker caches."""
FETCHED_PER_S = 100_000.0
"""Prompt tokens that a worker fetches from a peer in a second: 12 GB/s at 128 KiB a token."""
WITHIN_S = 2.0
"""Time limit for a first token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Results of a replay."""

    hit_rate: float
    """Fraction of the prompt tokens that were cached."""
    ttft_s: tuple[float, ...]
    """Time to the first token of each request, in order of routing."""

    @property
    def mean_s(self) -> float:
        """Mean time to the first token."""
        return statistics.fmean(self.ttft_s)

    @property
    def share_in_time(self) -> float:
        """Fraction of the requests whose first token arrived within ``WITHIN_S``."""
        return sum(t <= WITHIN_S for t in self.ttft_s) / len(self.ttft_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """How workers fetch and evict blocks."""

    fetch_tokens_per_s: float | None = None
    """Prompt tokens that are fetched from a peer in a second; None disables fetches."""
    evicts_together: bool = False
    """Whether workers evict in the product's order instead of least recently used first."""


ALONE = Rules()
"""No fetches, least recently used blocks are evicted."""
FETCHING = Rules(fetch_tokens_per_s=FETCHED_PER_S)
"""With fetches from peers."""
TOGETHER = Rules(fetch_tokens_per_s=FETCHED_PER_S, evicts_together=True)
"""With fetches and the product's eviction order."""


@dataclass(frozen=True, slots=True)
class _Computed:
    """A computed prompt, as its worker reports it to the gateway."""

    time_s: float
    names: Sequence[bytes]
    events: KvEvents


class Reports:
    """Pending KV events of a worker, each with the time at which it reaches the gateway."""

    def __init__(self, worker: str, index: KvIndex) -> None:
        self._worker = worker
        self._index = index
        self._number = 0
        self._computed: deque[_Computed] = deque()
        index.apply(worker, KvEvents(number=0, is_whole=True))

    def add(
        self, time_s: float, names: Sequence[bytes], stored: Sequence[bytes], removed: Set[bytes]
    ) -> None:
        """Queue the event of a prompt with blocks ``names`` that is computed at ``time_s``."""
        self._number += 1
        new = set(stored)
        events = KvEvents(
            number=self._number,
            stored=tuple(name for name in stored if name not in removed),
            removed=tuple(name for name in removed if name not in new),
        )
        self._computed.append(_Computed(time_s, names, events))

    def tell(self, now_s: float) -> None:
        """Send the events of the prompts that are computed by ``now_s`` to the gateway."""
        while self._computed and self._computed[0].time_s <= now_s:
            report = self._computed.popleft()
            assert self._index.apply(self._worker, report.events), "no message is lost here"
            self._index.end_expectation(self._worker, report.names)


class Worker:
    """One attention worker: a queue of prompts, and a cache that reports its blocks."""

    def __init__(self, name: str, index: KvIndex, rules: Rules) -> None:
        self.load = WorkerLoad(name=name)
        """Load as the router sees it."""
        self.free_s = 0.0
        """Time at which the worker has computed all its prompts."""
        if rules.fetch_tokens_per_s is not None:
            self.load.fetch_cost = TOKENS_PER_S / rules.fetch_tokens_per_s
        self.reports = Reports(name, index)
        self._rules = rules
        self._order = EvictionOrder(USED_RATE if rules.evicts_together else NEW_RATE)
        self._here: set[bytes] = set()

    def wait_s(self, now_s: float) -> float:
        """Seconds until the worker starts a prompt that arrives now."""
        return max(self.free_s - now_s, 0.0)

    def num_cached(self, names: Sequence[bytes]) -> int:
        """Number of leading blocks of a prompt that are cached."""
        return next((i for i, name in enumerate(names) if name not in self._here), len(names))

    def take(
        self, names: Sequence[bytes], tokens: int, now_s: float, peer: Worker | None = None
    ) -> tuple[float, int]:
        """Compute a prompt; returns the seconds to its first token and the cached tokens."""
        found, start_s = self.num_cached(names), self.wait_s(now_s)
        if peer is not None:
            start_s = max(start_s, self._fetch(names, found, peer))
            found = max(found, peer.num_cached(names))
        cached = found * BLOCK_TOKENS
        ttft_s = start_s + (tokens - cached) / TOKENS_PER_S
        self.free_s = now_s + ttft_s
        self._keep(names, found)
        return ttft_s, cached

    def _fetch(self, names: Sequence[bytes], found: int, peer: Worker) -> float:
        """Fetch the missing blocks from a peer; returns the seconds that it takes."""
        assert self._rules.fetch_tokens_per_s is not None
        lent = peer.num_cached(names)
        if lent <= found:
            return 0.0
        if self._rules.evicts_together:
            peer._order.mark_duplicated(names[found:lent])
        fetched = (lent - found) * BLOCK_TOKENS
        return FETCH_TOKENS / TOKENS_PER_S + fetched / self._rules.fetch_tokens_per_s

    def _keep(self, names: Sequence[bytes], num_found: int) -> None:
        order = self._order
        stored = [name for name in names if name not in self._here]
        for place, name in enumerate(names):
            if name in self._here:
                order.hold(name)
            else:
                order.learn(name, names[place - 1] if place else None)
            if place < num_found:
                order.find(name)
        for name in reversed(names):  # the end of a sequence goes first
            order.release(name)
        self._here.update(names)
        removed = set[bytes]()
        while len(self._here) > CACHE_BLOCKS:
            gone = order.pop()
            order.forget(gone)
            self._here.remove(gone)
            removed.add(gone)
        self.reports.add(self.free_s, names, stored, removed)


def replay(
    requests: Sequence[TracedRequest],
    policy: RoutingPolicy,
    speed: float = 1.0,
    rules: Rules = ALONE,
) -> Outcome:
    """Route all requests; those of the same time shortest first, as the gateway does."""
    index = KvIndex()
    workers = {f"w{i}": Worker(f"w{i}", index, rules) for i in range(NUM_WORKERS)}
    uses_index = policy is RoutingPolicy.KV
    ttft_s: list[float] = []
    num_cached = 0
    for time_s, together in groupby(requests, key=lambda request: request.time_s):
        now_s = time_s / speed
        for worker in workers.values():
            worker.reports.tell(now_s)
        prompts = [_Prompt(request, index, uses_index) for request in together]
        for prompt in sorted(prompts, key=lambda prompt: prompt.missing):
            for worker in workers.values():
                worker.load.queued_tokens = worker.wait_s(now_s) * TOKENS_PER_S
                worker.load.outstanding_tokens = int(worker.load.queued_tokens)
            choice = _route(prompt, index, list(workers.values()), policy, len(ttft_s))
            index.expect(choice.load.name, prompt.names)
            chosen, peer = workers[choice.load.name], workers.get(choice.peer)
            took_s, cached = chosen.take(prompt.names, prompt.tokens, now_s, peer)
            ttft_s.append(took_s)
            num_cached += cached
    return Outcome(
        hit_rate=num_cached / sum(request.prompt_tokens for request in requests),
        ttft_s=tuple(ttft_s),
    )


class _Prompt:
    """A request as the gateway sees it."""

    def __init__(self, request: TracedRequest, index: KvIndex, uses_index: bool) -> None:
        self.tokens = request.prompt_tokens
        full = request.blocks[: self.tokens // BLOCK_TOKENS]
        self.names = [block.to_bytes(SHORT_BYTES, "big") for block in full]
        found = index.matches(self.names) if uses_index else {}
        self.missing = self.tokens - max(found.values(), default=0) * BLOCK_TOKENS
        """Tokens that no worker has cached; the prompt with the fewest is routed first."""


def _route(
    prompt: _Prompt,
    index: KvIndex,
    workers: Sequence[Worker],
    policy: RoutingPolicy,
    num_routed: int,
) -> Route:
    loads = [worker.load for worker in workers]
    if policy is not RoutingPolicy.KV:
        return pick_worker(loads, policy, num_routed)
    return route_by_kv(index, prompt.names, loads, num_routed, prompt.tokens, BLOCK_TOKENS)


def decision_s(num_workers: int, num_blocks: int, repeats: int) -> float:
    """Median seconds of a decision for a prompt of 128 blocks, partly cached on each worker."""
    draw = random.Random(0)
    prompt = [draw.randbytes(SHORT_BYTES) for _ in range(128)]
    index, loads = KvIndex(), []
    for i in range(num_workers):
        own = [draw.randbytes(SHORT_BYTES) for _ in range(num_blocks // num_workers)]
        stored = (*prompt[: draw.randrange(128)], *own)
        index.apply(f"w{i}", KvEvents(number=0, is_whole=True, stored=stored))
        loads.append(
            WorkerLoad(name=f"w{i}", queued_tokens=draw.randrange(1000), fetch_cost=draw.random())
        )
    times = []
    for num_routed in range(repeats):
        start = time.perf_counter()
        route_by_kv(index, prompt, loads, num_routed, 128 * 16, 16)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


CASES = {
    "`kv`, fetches, eviction across workers": (RoutingPolicy.KV, TOGETHER),
    "`kv`, fetches": (RoutingPolicy.KV, FETCHING),
    "`kv`": (RoutingPolicy.KV, ALONE),
    "`least-loaded`": (RoutingPolicy.LEAST_LOADED, ALONE),
    "`round-robin`": (RoutingPolicy.ROUND_ROBIN, ALONE),
}
"""Label in the table -> routing policy and rules of the workers."""


def section(quick: bool) -> str:
    """Return the Markdown section."""
    requests = conversations()[: 300 if quick else None]
    traces = {"conversations": (requests, 1.0), "conversations, 1.4 times as fast": (requests, 1.4)}
    for seed in range(1 if quick else 3):
        traces[f"multi-turn chats {seed + 1}"] = multi_turn(seed, 300 if quick else 12000), 1.0
    rows = []
    for trace, (asked, speed) in traces.items():
        for name, (policy, rules) in CASES.items():
            outcome = replay(asked, policy, speed, rules)
            rows.append(
                [
                    f"{trace}: {name}",
                    f"{outcome.mean_s:.2f}",
                    f"{outcome.hit_rate:.3f}",
                    f"{outcome.share_in_time:.3f}",
                ]
            )
    sizes = [(64, 100_000), (64, 1_000_000)][: 1 if quick else None]
    decisions = [
        [f"{n} workers, {blocks:,} blocks", f"{decision_s(n, blocks, 2000) * 1e6:.0f}"]
        for n, blocks in sizes
    ]
    head = ["trace: policy", "mean TTFT, s", "cached tokens", "requests with TTFT within 2 s"]
    return "\n\n".join(
        [
            "## Routing, simulated",
            " ".join((__doc__ or "").split("\n\n", 2)[2].split()),
            "Conversations are the public Mooncake trace. The multi-turn chats are generated: see "
            "`multi_turn` in `benchmarks/simulated/request_trace.py`. The second table has the "
            "time that the gateway takes to choose a worker. Values without a unit are fractions.",
            table(head, rows),
            table(["size of the KV index", "time of a decision, median, us"], decisions),
        ]
    )
