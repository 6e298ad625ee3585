"""Keeps copies of other workers' KV blocks in host memory, for later turns of their sessions.

A gateway names the blocks of a session's turn and the worker that computed them. A thread fetches
the blocks that are not in host memory, at a limited rate. Neither worker's steps wait: the other
worker pins a few blocks at a time between two steps. It does not evict them earlier because of the
copy (``is_spare`` of ``PeerClient.fetch``). If the session continues on this worker, the engine
computes the blocks that were not sent or did not fit.

For a model with recurrent states, the last state of the sequence is fetched first, as it decides
how many blocks are useful.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing

from cluster.core.errors import TransferAbortedError, TransportError
from workers.experts.transfer.rate_limit import RateLimit
from workers.kv.cache import KVCache
from workers.kv.tiers.tiers import KvTiers
from workers.metrics.histogram import TRANSFER_BUCKETS, Histogram
from workers.process.intake.copy_fetch import CopyFetch
from workers.process.intake.copy_queue import CopyQueue, QueuedCopy
from workers.requests.wire import KeepCopy
from workers.transport.peer_link import PeerClient, PeerEndpoint

logger = logging.getLogger(__name__)

_TIMEOUT_S = 15.0
"""Time limit for data from the other worker, which replies between two of its steps."""
_STOP_S = 1.0
"""Time limit for joining the thread, which ends at the latest when its wait for data ends."""
OUTCOMES = ("whole", "part", "failed", "skipped")
"""Outcomes of copies, in this order: all blocks are stored; some are missing at the other worker or
do not fit; it is unreachable or sent invalid data; the queue was full, or this worker ends."""


class CopyReceiver:
    """Fetches and keeps session copies. Any thread may call the methods; only ``close`` waits.

    Args:
        tiers: store the blocks.
        cache: defines the shapes of a block and a state.
        peers: returns the KV server of a worker by name; None for an unknown one.
        wake: called on another thread when blocks have arrived.
        bytes_per_s: rate limit of received blocks.
    """

    def __init__(
        self,
        tiers: KvTiers,
        cache: KVCache,
        peers: Callable[[str], PeerEndpoint | None],
        wake: Callable[[], None],
        bytes_per_s: float,
    ) -> None:
        self._tiers = tiers
        self._cache = cache
        self._peers = peers
        self._wake = wake
        self._is_ending = threading.Event()
        self._limit = RateLimit(bytes_per_s, cancelled=self._is_ending)
        self._changed = threading.Condition()
        self._queue = CopyQueue()
        self._outcomes = Counter[str]()
        self._num_blocks = 0
        self._num_bytes = 0
        self._seconds = Histogram(TRANSFER_BUCKETS)
        self._thread = threading.Thread(target=self._run, name="copy-receiver", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, message: KeepCopy) -> None:
        """Queue a copy of the blocks that ``message`` lists."""
        peer = self._peers(message.source)
        with self._changed:
            if peer is None:  # it has left the generation
                self._outcomes["failed"] += 1
                return
            self._outcomes["skipped"] += self._queue.put(QueuedCopy(message, peer))
            self._changed.notify()

    def close(self) -> None:
        """End the thread and drop queued copies."""
        self._is_ending.set()
        with self._changed:
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(_STOP_S)

    def stats(self) -> dict[str, float]:
        """Counters by metric name without prefix."""
        with self._changed:
            outcomes, num_waiting = Counter(self._outcomes), len(self._queue)
        return {
            **self._seconds.stats("kv_migration_seconds", 'reason="copy"'),
            'kv_migration_bytes_total{reason="copy"}': float(self._num_bytes),
            'kv_migration_failures_total{reason="copy"}': float(outcomes["failed"]),
            **{
                f'session_copies_total{{outcome="{outcome}"}}': float(outcomes[outcome])
                for outcome in OUTCOMES
            },
            "session_copies_waiting": float(num_waiting),
            "session_copy_blocks_total": float(self._num_blocks),
        }

    def _run(self) -> None:
        while (copy := self._next()) is not None:
            began_s = time.monotonic()
            outcome = self._try(copy)
            self._seconds.observe(time.monotonic() - began_s)
            with self._changed:
                self._outcomes[outcome] += 1
            self._wake()

    def _next(self) -> QueuedCopy | None:
        """Wait for a copy to fetch; None if this worker ends."""
        with self._changed:
            while not self._is_ending.is_set():
                if (copy := self._queue.take()) is not None:
                    return copy
                self._changed.wait()
        return None

    def _try(self, copy: QueuedCopy) -> str:
        """Fetch a copy; returns one of ``OUTCOMES``."""
        try:
            return self._fetch(copy)
        except TransferAbortedError:
            return "skipped"
        except TransportError as err:
            logger.warning("could not copy KV blocks of %s: %s", copy.peer.name, err)
        except Exception:
            logger.exception("could not copy KV blocks of %s", copy.peer.name)
        return "failed"

    def _fetch(self, copy: QueuedCopy) -> str:
        """Fetch missing blocks. Raises ``TransportError``, ``TransferAbortedError``."""
        fetch = CopyFetch(self._tiers, self._cache, copy.message)
        if fetch.is_whole:
            fetch.mark_used()
            return "whole"
        try:
            link = PeerClient(copy.peer, _TIMEOUT_S, before_chunk=self._limit.take)
            with closing(link) as client:
                fetch.run(client)
        finally:
            self._num_blocks += fetch.num_blocks
            self._num_bytes += fetch.num_bytes
        return "whole" if fetch.is_whole else "part"
