"""Requests that wait for blocks of their prompt from a peer, so that the engine never does.

Each prefix is fetched in a thread of its own, a few at a time, straight into blocks that are held
for it. Whatever goes wrong, or takes too long, the request goes on and computes what has not come.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cluster.errors import TransportError
from workers.engine import Engine
from workers.engine_server import AddRequest
from workers.histogram import TRANSFER_BUCKETS, Histogram
from workers.kv_exchange import Fetch
from workers.kv_link import Asking, block_buffer, fetch_blocks
from workers.kv_pace import KvPace
from workers.waiting import WaitingRequests

logger = logging.getLogger(__name__)

MAX_FETCHING = 4
"""Prefixes that are fetched at the same time; further requests compute theirs."""


@dataclass(slots=True, eq=False)
class _Job:
    """One prefix on its way."""

    fetch: Fetch
    asking: Asking
    waiting: list[AddRequest]
    is_done: bool = False
    """Written last, by the job's thread."""


class KvGate(WaitingRequests):
    """See the module. All methods belong to the engine's thread.

    Args:
        engine: has the blocks.
        peers: tells how to ask a worker by name, with the deadline given; None for no peer of ours.
        wake: called, by any thread, when there is something to take.
        limit_s: longest wait; 0: nothing is fetched.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        engine: Engine,
        peers: Callable[[str, float], Asking | None],
        wake: Callable[[], None],
        limit_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._peers = peers
        self._wake = wake
        self._limit_s = limit_s
        self._clock = clock
        self._jobs: list[_Job] = []
        self.pace = KvPace()
        """What fetching costs."""
        self._seconds = Histogram(TRANSFER_BUCKETS)
        self._num_bytes = 0
        self._num_failed = 0

    @property
    def fetch_cost(self) -> float:
        """See ``KvEvents``."""
        return self.pace.cost(self._clock()) if self._limit_s else float("inf")

    def put(self, command: AddRequest) -> bool:
        """Let a request wait for blocks; False where there is nothing to wait for."""
        request = command.request
        if not request.kv_peer or self.fetch_cost >= 1 or len(self._jobs) >= MAX_FETCHING:
            return False
        asking = self._peers(request.kv_peer, self._clock() + self._limit_s)
        fetch = None if asking is None else self._engine.begin_fetch(request)
        if asking is None or fetch is None:
            return False
        same = next((j for j in self._jobs if j.fetch.wanted[0] == fetch.wanted[0]), None)
        if same is not None and not same.is_done:
            self._engine.exchange.end(fetch)  # they come already
            same.waiting.append(command)
        else:
            job = _Job(fetch, asking, [command])
            self._jobs.append(job)
            threading.Thread(target=self._run, args=(job,), name="kv-fetcher", daemon=True).start()
        self._count()
        return True

    def take(self) -> list[AddRequest]:
        """Requests whose wait is over, in the order in which it began."""
        now, found = self._clock(), []
        for job in tuple(self._jobs):
            if job.is_done:
                self._engine.exchange.end(job.fetch)
                self._jobs.remove(job)
            elif now < job.asking.deadline_s:
                continue
            found += job.waiting  # its blocks stay held until the thread has ended
            job.waiting = []
        self._count()
        return found

    def wait_s(self, at_most_s: float) -> float:
        """Seconds until a limit passes, if that is sooner than ``at_most_s``."""
        ends = [job.asking.deadline_s for job in self._jobs if job.waiting]
        return min(at_most_s, max(0.0, min(ends) - self._clock())) if ends else at_most_s

    def stats(self) -> dict[str, float]:
        """Counters by metric name without prefix. Any thread may call it."""
        return {
            **self._seconds.stats("kv_migration_seconds", 'reason="prefix"'),
            'kv_migration_bytes_total{reason="prefix"}': float(self._num_bytes),
            'kv_migration_failures_total{reason="prefix"}': float(self._num_failed),
        }

    def _all_jobs(self) -> list[_Job]:
        return self._jobs

    def _run(self, job: _Job) -> None:
        """The job's thread."""
        cache, fetch, began_s = self._engine.exchange.cache, job.fetch, self._clock()
        buffer = block_buffer(cache.block_shape, cache.dtype)

        def keep(place: int, data: Tensor) -> None:
            cache.write_block(fetch.blocks[place], data)
            fetch.num_filled = place + 1

        try:
            fetch_blocks(job.asking, fetch.wanted, buffer, keep)
        except TransportError as err:
            self._num_failed += 1
            logger.warning("KV blocks of %s are computed: %s", job.asking.peer, err)
        except Exception:
            self._num_failed += 1
            logger.exception("KV blocks of %s are computed", job.asking.peer)
        took_s = self._clock() - began_s
        self._seconds.observe(took_s)
        self._num_bytes += fetch.num_filled * buffer.nbytes
        self.pace.observe_fetch(fetch.num_filled * cache.block_size, took_s, self._clock())
        job.is_done = True
        self._wake()
