"""Where requests go, on paper: the gateway's own index and policies on a chat service's requests.

python -m benchmarks.run --only routing

The model: 8 workers compute 8,000 prompt tokens a second each, one prompt after the other, and keep
2,500 blocks of 512 tokens each, least recently used first out; decoding costs nothing. What a
worker has is known at once, since the gateway expects what it has just routed.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from benchmarks.request_trace import BLOCK_TOKENS, TracedRequest, conversations
from benchmarks.results import table
from gateway.kv_index import KvIndex
from gateway.router import RoutingPolicy, WorkerLoad, pick_worker
from workers.prefix_hash import SHORT_BYTES, KvEvents

NUM_WORKERS = 8
"""Workers of the model."""
TOKENS_PER_S = 8000.0
"""Prompt tokens that each computes."""
CACHE_BLOCKS = 2500
"""Blocks that each keeps."""
WITHIN_S = 2.0
"""A first token in this time is counted as in time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What the requests saw."""

    hit_rate: float
    """Part of the prompt tokens that were cached."""
    ttft_s: tuple[float, ...]
    """Time to the first token, by request, in order of routing."""

    @property
    def mean_s(self) -> float:
        """Mean time to the first token."""
        return statistics.fmean(self.ttft_s)

    @property
    def share_in_time(self) -> float:
        """Part of the requests whose first token came within ``WITHIN_S``."""
        return sum(t <= WITHIN_S for t in self.ttft_s) / len(self.ttft_s)


class Worker:
    """One attention worker: a queue of prompts, and a cache that tells of its blocks."""

    def __init__(self, name: str, index: KvIndex) -> None:
        self.load = WorkerLoad(name=name)
        """For the router."""
        self.free_s = 0.0
        """When it has computed all it was given."""
        self._index = index
        self._cache: OrderedDict[bytes, None] = OrderedDict()
        self._number = 0
        index.apply(name, KvEvents(number=0, is_whole=True))

    def wait_s(self, now_s: float) -> float:
        """Until it begins with a prompt that comes now."""
        return max(self.free_s - now_s, 0.0)

    def take(self, names: Sequence[bytes], tokens: int, now_s: float) -> tuple[float, int]:
        """Compute a prompt: seconds to its first token, and tokens that were cached."""
        found = 0
        while found < len(names) and names[found] in self._cache:
            found += 1
        cached = min(found * BLOCK_TOKENS, tokens)
        ttft_s = self.wait_s(now_s) + (tokens - cached) / TOKENS_PER_S
        self.free_s = now_s + ttft_s
        self._keep(names)
        return ttft_s, cached

    def _keep(self, names: Sequence[bytes]) -> None:
        stored = [name for name in names if name not in self._cache]
        for name in reversed(names):  # the end of a sequence goes first
            self._cache[name] = None
            self._cache.move_to_end(name)
        removed = []
        while len(self._cache) > CACHE_BLOCKS:
            removed.append(self._cache.popitem(last=False)[0])
        self._number += 1
        news = KvEvents(number=self._number, stored=tuple(stored), removed=tuple(removed))
        assert self._index.apply(self.load.name, news), "no message is lost here"


Choice = Callable[[Sequence[Worker], KvIndex, Sequence[bytes], int, int], Worker]
"""Workers, index, a prompt's block names and tokens, turn -> worker."""


def by_policy(policy: RoutingPolicy) -> Choice:
    """A policy of the gateway."""

    def choose(
        workers: Sequence[Worker], index: KvIndex, names: Sequence[bytes], tokens: int, turn: int
    ) -> Worker:
        found = index.matches(names) if policy is RoutingPolicy.KV else {}
        cached = {w: min(n * BLOCK_TOKENS, tokens) for w, n in found.items()}
        loads = [worker.load for worker in workers]
        picked = pick_worker(loads, policy, turn, tokens, cached)
        return next(worker for worker in workers if worker.load is picked)

    return choose


def replay(requests: Sequence[TracedRequest], choose: Choice, speed: float = 1.0) -> Outcome:
    """Route all requests, those of one moment together as the gateway does: shortest first."""
    index = KvIndex()
    workers = [Worker(f"w{i}", index) for i in range(NUM_WORKERS)]
    ttft_s: list[float] = []
    num_cached = 0
    for _, together in groupby(requests, key=lambda request: request.time_s):
        for request in sorted(together, key=lambda request: request.prompt_tokens):
            now_s, tokens = request.time_s / speed, request.prompt_tokens
            for worker in workers:
                worker.load.queued_tokens = worker.wait_s(now_s) * TOKENS_PER_S
                worker.load.outstanding_tokens = int(worker.load.queued_tokens)
            names = [block.to_bytes(SHORT_BYTES, "big") for block in request.blocks]
            chosen = choose(workers, index, names, tokens, len(ttft_s))
            took_s, cached = chosen.take(names, tokens, now_s)
            ttft_s.append(took_s)
            num_cached += cached
    return Outcome(
        hit_rate=num_cached / sum(request.prompt_tokens for request in requests),
        ttft_s=tuple(ttft_s),
    )


def decision_s(num_workers: int, num_blocks: int, repeats: int) -> float:
    """Median time of one decision for a prompt of 128 blocks, each worker with a part of it."""
    draw = random.Random(0)
    prompt = [draw.randbytes(SHORT_BYTES) for _ in range(128)]
    index, loads = KvIndex(), []
    for i in range(num_workers):
        own = [draw.randbytes(SHORT_BYTES) for _ in range(num_blocks // num_workers)]
        stored = (*prompt[: draw.randrange(128)], *own)
        index.apply(f"w{i}", KvEvents(number=0, is_whole=True, stored=stored))
        loads.append(WorkerLoad(name=f"w{i}", queued_tokens=draw.randrange(1000)))
    times = []
    for turn in range(repeats):
        start = time.perf_counter()
        pick_worker(loads, RoutingPolicy.KV, turn, 128 * 16, index.matches(prompt))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def section(quick: bool) -> str:
    """The section of ``RESULTS.md``."""
    requests = conversations()[: 300 if quick else None]
    rows = []
    for speed in (1.0, 1.4):
        for policy in RoutingPolicy:
            outcome = replay(requests, by_policy(policy), speed)
            rows.append(
                [
                    f"{speed:g} x, `{policy.value}`",
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
    head = ["rate, policy", "mean TTFT s", "cached tokens", "TTFT within 2 s"]
    return "\n\n".join(
        [
            "## Routing, on paper",
            " ".join((__doc__ or "").split("\n\n", 2)[2].split()),
            table(head, rows),
            table(["decision", "median microseconds"], decisions),
        ]
    )
