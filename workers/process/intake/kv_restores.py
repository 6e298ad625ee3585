"""Requests that wait for KV blocks of their prompt from this worker's lower tiers.

A few prefixes are restored at a time, directly into blocks reserved for them. The measured times
decide how many blocks of a prefix are cheaper to restore than to compute. Blocks that no tier
provides in time are fetched from a peer or computed.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock

import torch
from torch import Tensor

from workers.engine.engine import Engine
from workers.kv.tiers.tiers import KvTiers
from workers.kv.transfer.fetch_cost import FetchCost
from workers.kv.transfer.restore_cost import RestoreCost
from workers.kv.transfer.store import Fetch
from workers.metrics.histogram import TRANSFER_BUCKETS, Histogram
from workers.process.intake.fetch_jobs import FetchJob, FetchJobs
from workers.process.intake.intake_request import IntakeRequest
from workers.requests.block_hash import BlockHash, state_key

logger = logging.getLogger(__name__)

MAX_RESTORING = 4
"""Maximum number of concurrent restores."""
MAX_JOBS = 32
"""Maximum number of running and queued restores; other requests compute their prefixes."""
MIN_LIMIT_S = 2.0
"""Minimum time limit of a restore, including the wait for a thread. The limit is the time to
compute the same tokens, if that is longer."""
_GRACE_S = 0.5
"""Seconds for which requests wait longer than a restore may read, so that its thread can end."""


@dataclass(slots=True)
class _TierRead:
    """Number of bytes and blocks read from a tier, and the seconds that this took."""

    num_bytes: int = 0
    num_blocks: int = 0
    seconds: float = 0.0


class _TierReader:
    """Reads items until a deadline, and measures each read with the write that follows it."""

    def __init__(self, tiers: KvTiers, clock: Callable[[], float], end_s: float) -> None:
        self.by_tier: dict[str, _TierRead] = {}
        self._tiers = tiers
        self._clock = clock
        self._end_s = end_s
        self._tier = ""
        self._since_s = clock()

    def take(self, name: bytes) -> Tensor | None:
        """Read an item; None if no tier has it, or the deadline has passed."""
        self._since_s = self._clock()
        held = self._tiers.read(name) if self._since_s < self._end_s else None
        if held is None:
            return None
        self._tier = held.tier
        self.by_tier.setdefault(held.tier, _TierRead()).num_bytes += held.data.numel()
        return held.data

    def note_written(self, *, is_block: bool) -> None:
        """Record that the last item was written to the cache."""
        read = self.by_tier[self._tier]
        read.num_blocks += is_block
        read.seconds += self._clock() - self._since_s


class KvRestores(FetchJobs):
    """Restores KV blocks from lower tiers. Call the methods on the engine's thread only.

    Args:
        engine: owns the blocks.
        tiers: hold the blocks that may be restored.
        computing: measured speeds of prefill and of fetches from peers.
        wake: called, on any thread, when ``take`` has a result.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        engine: Engine,
        tiers: KvTiers,
        computing: FetchCost,
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(wake, clock, "kv-restorer", MAX_RESTORING)
        self._engine = engine
        self._tiers = tiers
        self._store = engine.kv_store
        self._computing = computing
        cache = engine.kv_store.cache
        self._block_bytes, self._state_bytes = cache.block_bytes, cache.state_bytes
        self.cost = RestoreCost(computing, self._block_bytes / cache.block_size)
        """Measured cost of restores."""
        self._jobs: list[FetchJob] = []
        self._seconds = {name: Histogram(TRANSFER_BUCKETS) for name in tiers.names}
        self._num_tokens: Counter[str] = Counter()
        self._num_bytes: Counter[str] = Counter()
        self._measuring = Lock()
        """Held while a restorer thread adds to the cost and the counters."""

    def put(self, waiting: IntakeRequest) -> bool:
        """Start or join a restore for a request; False if the request need not wait."""
        request, store = waiting.request, self._store
        hashes = store.usable(request, waiting.hashes)
        cached = self._engine.pool.find(hashes)
        num_usable = store.num_usable(hashes, len(cached))
        if num_usable == len(hashes):
            return False
        job = self._job_filling(hashes[num_usable])
        waiting.has_joined = job is not None
        if job is None:
            end = self._best_end(hashes, len(cached), num_usable, bool(request.kv_peer))
            job = self._begin(hashes[:end], cached[:end]) if end > num_usable else None
        return self._wait_for(job, waiting)

    def limit_s(self, num_tokens: int) -> float:
        """Longest wait for the blocks of ``num_tokens`` tokens: about the time to compute them."""
        return max(MIN_LIMIT_S, self._computing.compute_s(num_tokens) or 0.0) + _GRACE_S

    @property
    def num_free_jobs(self) -> int:
        """Number of further prefixes that may be queued."""
        return MAX_JOBS - len(self._jobs)

    def take(self) -> list[IntakeRequest]:
        """Requests whose wait is over, in the order in which it started."""
        ended, requests = self._take_ended(self._store)
        self._jobs = [job for job in self._jobs if job not in ended]
        return requests

    def stats(self) -> dict[str, float]:
        """Counters by metric name without prefix. Any thread may call it."""
        stats: dict[str, float] = {}
        for tier, seconds in self._seconds.items():
            tokens, size = self._num_tokens[tier], self._num_bytes[tier]
            stats |= seconds.stats("kv_restore_seconds", f'tier="{tier}"')
            stats[f'kv_restore_tokens_total{{tier="{tier}"}}'] = float(tokens)
            stats[f'kv_restore_bytes_total{{tier="{tier}"}}'] = float(size)
        return stats

    def _all_jobs(self) -> list[FetchJob]:
        return self._jobs

    @property
    def _running(self) -> list[FetchJob]:
        return self._jobs

    def _best_end(
        self, hashes: Sequence[BlockHash], num_found: int, num_usable: int, has_peer: bool
    ) -> int:
        """Return up to which number of blocks a restore of the prefix saves most time.

        Returns ``num_usable`` if no restore saves time, or if a fetch from the peer is cheaper.
        """
        now_s, store, cost = self._clock(), self._store, self.cost
        names = self._tiers.names
        block_costs = {name: cost.tokens(name, self._block_bytes, now_s) for name in names}
        size, best, end, saved, spent = store.cache.block_size, 0.0, num_usable, 0.0, 0.0
        tiers = self._tiers.tiers_of(hashes[num_found:])
        for index in range(num_usable, num_found + len(tiers)):
            if index >= num_found:
                spent += block_costs[tiers[index - num_found]]
            saved += size
            net = saved - spent - self._state_cost(hashes[index], now_s)
            if net > best:
                best, end = net, index + 1
        is_dearer = has_peer and spent > saved * self._computing.ratio(now_s)
        return num_usable if is_dearer else end

    def _state_cost(self, name: BlockHash, now_s: float) -> float:
        """Tokens that could be computed while the recurrent state after a block is restored;
        infinite if no tier has the state."""
        states = self._store.states
        if states is None or states.num_known((name,)):
            return 0.0
        tier = self._tiers.tier_of(state_key(name))
        return math.inf if tier is None else self.cost.tokens(tier, self._state_bytes, now_s)

    def _begin(self, hashes: Sequence[BlockHash], cached: Sequence[int]) -> FetchJob | None:
        """Restore the blocks of a prefix after ``cached``; None if that is not possible now."""
        if len(self._jobs) >= MAX_JOBS or any(job.is_late for job in self._jobs):
            return None
        fetch = self._engine.begin_fetch(hashes, cached)
        if fetch is None:
            return None
        tokens = len(fetch.missing) * self._store.cache.block_size
        deadline_s = self._clock() + self.limit_s(tokens)
        end_s = deadline_s - _GRACE_S
        transfer = self._start(partial(self._restore, fetch, end_s))
        job = FetchJob(fetch=fetch, transfer=transfer, deadline_s=deadline_s)
        self._jobs.append(job)
        return job

    def _restore(self, fetch: Fetch, end_s: float) -> None:
        """Read blocks from the tiers until ``end_s``, in a thread of the executor."""
        cache, reads = self._store.cache, _TierReader(self._tiers, self._clock, end_s)
        try:
            if fetch.state is not None:
                data = reads.take(state_key(fetch.hashes[-1]))
                if data is not None:
                    state = data.view(torch.float32).view(cache.state_shape)
                    cache.write_state(fetch.state.slot, state)
                    reads.note_written(is_block=False)
                    fetch.state.num_before = len(fetch.hashes)
            for name, block in zip(fetch.wanted, fetch.blocks, strict=False):
                data = reads.take(name)
                if data is None:
                    break
                cache.write_block(block, data.view(cache.dtype).view(cache.block_shape))
                reads.note_written(is_block=True)
                fetch.num_filled += 1
        except Exception:  # for example out of memory; the rest is computed
            logger.exception("could not restore KV blocks")
        self._observe(reads)

    def _observe(self, reads: _TierReader) -> None:
        """Add the reads to metrics and costs. Called on the thread that has read the items."""
        with self._measuring:
            for tier, read in reads.by_tier.items():
                self._seconds[tier].observe(read.seconds)
                self._num_bytes[tier] += read.num_bytes
                self._num_tokens[tier] += read.num_blocks * self._store.cache.block_size
                self.cost.observe(tier, read.num_bytes, read.seconds, self._clock())
