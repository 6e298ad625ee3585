"""Requests that wait for KV blocks of their prompt from a peer, while the engine runs others.

A few prefixes are fetched at a time, directly into blocks reserved for them. If a fetch fails or
takes too long, the engine computes the missing blocks. Before a request moves from the peer to this
worker, its gateway can have its blocks fetched (``prefetch``), while the peer computes the next
ones. If the request arrives before the fetch ends, it waits for the fetch.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from threading import Lock

import torch

from cluster.core.errors import ProtocolError, TransportError
from workers.engine.engine import Engine
from workers.kv.cache import KVCache
from workers.kv.transfer.fetch_cost import FetchCost
from workers.kv.transfer.store import Fetch, StateFetch
from workers.metrics.histogram import TRANSFER_BUCKETS, Histogram
from workers.process.intake.commands import PrefetchRequested
from workers.process.intake.fetch_jobs import FetchJob, FetchJobs
from workers.process.intake.intake_request import IntakeRequest
from workers.process.intake.waiting import Job
from workers.requests.block_hash import BlockHash, state_key
from workers.requests.request import Request
from workers.requests.wire import Prefetched
from workers.transport.peer_link import MAX_ITEMS, PeerClient, PeerEndpoint, view_bytes

logger = logging.getLogger(__name__)

MAX_FETCHING = 16
"""Maximum number of concurrent fetches. Above it, requests compute their prefixes."""
_MAX_AHEAD = MAX_FETCHING // 2
"""Number of concurrent fetches at which none is begun before its request arrives."""
_AHEAD_LIMIT_S = 10.0
"""Time limit in seconds of such a fetch, which may wait for a long step of the peer."""


@dataclass(kw_only=True, slots=True, eq=False)
class _Prefetch(Job):
    """A prefetch: blocks to fetch before their request arrives, and the request once it waits."""

    command: PrefetchRequested
    num_begun: int = 0
    """Number of open choices for which the fetch of blocks was started or skipped."""


@dataclass(kw_only=True, slots=True, eq=False)
class _Job(FetchJob):
    ahead_of: _Prefetch | None = None
    """The prefetch that started this job, or None."""


class KvFetches(FetchJobs):
    """Fetches KV blocks from peers. Call the methods on the engine's thread only.

    Args:
        engine: owns the blocks.
        peers: returns the KV server of a worker by name; None for an unknown peer.
        wake: called, on any thread, when ``take`` has a result.
        limit_s: longest wait of a request in seconds; 0 disables fetches.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        engine: Engine,
        peers: Callable[[str], PeerEndpoint | None],
        wake: Callable[[], None],
        limit_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(wake, clock, "kv-fetcher", MAX_FETCHING)
        self._engine = engine
        self._peers = peers
        self._limit_s = limit_s
        self._jobs: list[_Job] = []
        self._prefetches: list[_Prefetch] = []
        """Prefetches that are not complete, oldest first."""
        self._ready: list[IntakeRequest] = []
        """Requests whose prefetches are complete."""
        self._prefetched: list[tuple[str, Prefetched]] = []
        self.cost = FetchCost()
        """Measured cost of fetches."""
        self._seconds = Histogram(TRANSFER_BUCKETS)
        self._num_bytes = 0
        self._num_failed = 0
        self._measuring = Lock()
        """Held while a fetcher thread adds to the cost and the counters."""

    @property
    def fetch_cost(self) -> float:
        return self.cost.ratio(self._clock()) if self._limit_s else math.inf

    num_free_jobs = sys.maxsize
    """See ``KvSource``. Unlimited, as ``put`` returns False above ``MAX_FETCHING``."""

    def limit_s(self, num_tokens: int) -> float:
        """Longest wait for the blocks of a prompt, in seconds; the same for all lengths."""
        return self._limit_s

    def put(self, waiting: IntakeRequest) -> bool:
        """Start or join a fetch for a request; False if the request need not wait.

        The request replaces an older attempt of itself that waits here.
        """
        request = waiting.request
        super().drop(waiting.name)
        prefetch = self._prefetch_of(request)
        if prefetch is not None and request.kv_peer and not self._has_begun(prefetch):
            self._prefetches.remove(prefetch)  # the request is more urgent
        elif prefetch is not None:
            prefetch.waiting.append(waiting)
            prefetch.deadline_s = self._clock() + self._limit_s
            return True
        is_worth_it = self.fetch_cost < 1 or bool(request.output_so_far)  # it is moving
        peer = self._peers(request.kv_peer) if is_worth_it else None
        if peer is None:
            return False
        hashes = self._engine.kv_store.usable(request, waiting.hashes)
        cached = self._engine.pool.find(hashes)
        num_usable = self._engine.kv_store.num_usable(hashes, len(cached))
        if num_usable == len(hashes):
            return False
        job = self._job_filling(hashes[num_usable]) or self._begin(hashes, cached, peer)
        return self._wait_for(job, waiting)

    def take(self) -> list[IntakeRequest]:
        """Requests whose wait is over, in the order in which it started."""
        ended, requests = self._take_ended(self._engine.kv_store)
        self._jobs = [job for job in self._jobs if job not in ended]
        for job in self._jobs:
            if job.is_late:
                job.ahead_of = None
        now = self._clock()
        for prefetch in [p for p in self._prefetches if now >= p.deadline_s]:
            self._prefetches.remove(prefetch)
            requests += prefetch.waiting
        self._continue_prefetches()
        requests += self._ready
        self._ready = []
        return requests

    def prefetch(self, command: PrefetchRequested) -> None:
        """Fetch the blocks of a request that will arrive. ``take_prefetched`` reports the end."""
        self._prefetches.append(_Prefetch(command=command))
        self._continue_prefetches()

    def take_prefetched(self) -> list[tuple[str, Prefetched]]:
        """Remove and return completed prefetches whose requests have not arrived, as (gateway,
        reply) pairs.
        """
        done, self._prefetched = self._prefetched, []
        return done

    def drop(self, name: str) -> None:
        """Remove a request that waits here, and its prefetch."""
        super().drop(name)
        self._keep_prefetches(lambda asked: asked.request.request_id != name)

    def drop_gateway(self, gateway: str) -> None:
        """Remove the requests and prefetches of a gateway."""
        super().drop_gateway(gateway)
        self._keep_prefetches(lambda asked: asked.gateway != gateway)

    def stats(self) -> dict[str, float]:
        """Counters by metric name without prefix. Any thread may call it."""
        return {
            **self._seconds.stats("kv_migration_seconds", 'reason="prefix"'),
            'kv_migration_bytes_total{reason="prefix"}': float(self._num_bytes),
            'kv_migration_failures_total{reason="prefix"}': float(self._num_failed),
        }

    def _all_jobs(self) -> list[Job]:
        return [*self._jobs, *self._prefetches]

    @property
    def _running(self) -> list[_Job]:
        return self._jobs

    def has_prefetch(self, request: Request) -> bool:
        """Whether there is a prefetch for an arriving request."""
        return any(p.command.request.request_id == request.request_id for p in self._prefetches)

    def _prefetch_of(self, request: Request) -> _Prefetch | None:
        """The prefetch for an arriving request, or None. Drops prefetches for its older attempts
        and prefetches from lost workers.
        """
        current = None
        for prefetch in tuple(self._prefetches):
            expected = prefetch.command.request
            if expected.request_id == request.request_id:
                is_near = self._peers(expected.kv_peer) is not None
                if expected.attempt + 1 == request.attempt and is_near:
                    current = prefetch
                else:
                    self._prefetches.remove(prefetch)
        return current

    def _has_begun(self, prefetch: _Prefetch) -> bool:
        """Whether a prefetch has a thread, or has had one for all choices."""
        return self._is_running(prefetch) or prefetch.num_begun == len(prefetch.command.chains)

    def _is_running(self, prefetch: _Prefetch) -> bool:
        return any(job.ahead_of is prefetch for job in self._jobs)

    def _keep_prefetches(self, is_wanted: Callable[[PrefetchRequested], bool]) -> None:
        self._prefetches = [p for p in self._prefetches if p.waiting or is_wanted(p.command)]

    def _continue_prefetches(self) -> None:
        """Start the next fetch of each prefetch that has none running; complete finished ones."""
        for prefetch in tuple(self._prefetches):
            if self._is_running(prefetch):
                continue
            if not self._begin_next(prefetch) and prefetch.num_begun == len(
                prefetch.command.chains
            ):
                self._prefetches.remove(prefetch)
                # The prompt may have more blocks now than when the prefetch began.
                self._ready += [waiting for waiting in prefetch.waiting if not self.put(waiting)]
                if prefetch.waiting:
                    continue
                request = prefetch.command.request
                answer = Prefetched(request_id=request.request_id, attempt=request.attempt)
                self._prefetched.append((prefetch.command.gateway, answer))

    def _begin_next(self, prefetch: _Prefetch) -> bool:
        """Fetch the blocks of the next choice; False if no thread is free or none needs a fetch.

        A prefetch ignores the cost, as no request waits for it yet. Blocks that do not fit are
        computed later.
        """
        chains, request = prefetch.command.chains, prefetch.command.request
        peer = self._peers(request.kv_peer) if self._limit_s else None
        while len(self._jobs) < _MAX_AHEAD and prefetch.num_begun < len(chains):
            hashes = chains[prefetch.num_begun]
            prefetch.num_begun += 1
            cached = self._engine.pool.find(hashes)
            job = None if peer is None else self._begin(hashes, cached, peer, prefetch)
            if job is not None:
                return True
        return False

    def _begin(
        self,
        hashes: Sequence[BlockHash],
        cached: Sequence[int],
        peer: PeerEndpoint,
        ahead_of: _Prefetch | None = None,
    ) -> _Job | None:
        """Fetch the blocks of a prefix after ``cached``; None if that is not possible or needed."""
        if len(self._jobs) >= MAX_FETCHING:
            return None
        end = self._engine.kv_store.num_usable(hashes, len(cached)) + MAX_ITEMS
        fetch = self._engine.begin_fetch(hashes[:end], cached[:end])
        if fetch is None:
            return None
        limit_s = self._limit_s if ahead_of is None else max(self._limit_s, _AHEAD_LIMIT_S)
        deadline_s, is_measured = self._clock() + limit_s, ahead_of is None
        receive = partial(self._receive, fetch, peer, deadline_s, is_measured=is_measured)
        transfer = self._start(receive)
        job = _Job(fetch=fetch, transfer=transfer, deadline_s=deadline_s, ahead_of=ahead_of)
        self._jobs.append(job)
        return job

    def _receive(
        self, fetch: Fetch, peer: PeerEndpoint, deadline_s: float, *, is_measured: bool
    ) -> None:
        """Fetch blocks from a peer, in a thread of the executor; errors are only logged.

        ``is_measured``: whether the time counts for ``cost``. A prefetch may wait for the peer to
        compute the blocks.
        """
        cache, began_s = self._engine.kv_store.cache, self._clock()
        buffer = torch.empty(cache.block_shape, dtype=cache.dtype)
        state_bytes, has_failed = 0, False

        def keep(index: int) -> None:
            cache.write_block(fetch.blocks[index], buffer)
            fetch.num_filled = index + 1

        try:
            with closing(PeerClient(peer, deadline_s - began_s, deadline_s=deadline_s)) as client:
                if fetch.state is not None:  # first, as it decides how many blocks are useful
                    state_bytes = _receive_state(client, fetch, fetch.state, cache)
                if fetch.wanted:
                    client.fetch("a KV block", fetch.wanted, [view_bytes(buffer)], keep)
        except TransportError as err:
            has_failed = True
            logger.warning("could not fetch KV blocks of %s: %s", peer.name, err)
        except Exception:
            has_failed = True
            logger.exception("could not fetch KV blocks of %s", peer.name)
        ended_s, num_tokens = self._clock(), fetch.num_gained * cache.block_size
        with self._measuring:
            self._seconds.observe(ended_s - began_s)
            self._num_bytes += state_bytes + fetch.num_filled * buffer.nbytes
            self._num_failed += has_failed
            if is_measured:
                self.cost.observe_fetch(num_tokens, ended_s - began_s, ended_s)


def _receive_state(client: PeerClient, fetch: Fetch, state: StateFetch, cache: KVCache) -> int:
    """Fetch the last state that the peer has of a prefix, into the slot of ``state``.

    Returns the bytes of the state, or 0 if the peer has none.
    """
    index, data = torch.zeros(1, dtype=torch.int64), torch.empty(cache.state_shape)
    keys = [*map(state_key, fetch.hashes[state.num_known :])]
    if not client.fetch("a recurrent state", keys, [view_bytes(index), view_bytes(data)]):
        return 0
    if not 0 <= int(index) < len(keys):
        raise ProtocolError(
            f"a recurrent state from {client.peer} has index {int(index)} among {len(keys)} keys"
        )
    cache.write_state(state.slot, data)
    state.num_before = state.num_known + int(index) + 1
    return data.nbytes
