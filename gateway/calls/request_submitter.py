"""Sends the requests of an admitted call to the engines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from cluster.core.errors import DeadlineExceededError, NotReadyError
from gateway.calls.readiness import Readiness
from gateway.calls.request_trace import traced
from gateway.calls.running_call import RunningCall
from gateway.cluster.view import SnapshotFollower
from gateway.engines.engine_pool import EnginePool
from gateway.offload.long_work import LongWork
from workers.requests.block_hash import BlockHash, block_hashes
from workers.requests.request import Request
from workers.requests.wire import EngineHello

_POLL_S = 0.5
"""Interval in seconds at which a request without a worker checks whether its call has ended."""
_REQUESTS_PER_PASS = 32
"""Maximum number of a call's requests that are routed in one iteration of the event loop."""
_PASSES_TO_SEND = 2
"""Number of iterations of the event loop after which a request has been written to its worker's
stream. ``submit`` waits for them, so that long work of the caller does not delay the request."""


class RequestSubmitter:
    """Sends requests to the engines as soon as the engines can accept them.

    Args:
        engines: streams to the workers.
        cluster: signals changes of the cluster's state.
        readiness: tells whether the cluster serves requests.
        long_work: computes block hashes of long prompts.
        stream_wait_s: longest wait of a request, in seconds, for a stream to any worker.
    """

    def __init__(
        self,
        engines: EnginePool,
        cluster: SnapshotFollower,
        readiness: Readiness,
        long_work: LongWork,
        stream_wait_s: float,
    ) -> None:
        self._engines = engines
        self._cluster = cluster
        self._readiness = readiness
        self._long_work = long_work
        self._stream_wait_s = stream_wait_s

    async def submit(self, running: RunningCall, hello: EngineHello | None) -> None:
        """Send all requests of a call to the engines.

        Args:
            running: the call.
            hello: description of the KV blocks for routing; None if routing ignores cached blocks.

        Raises:
            NotReadyError: the cluster cannot serve the requests.
            DeadlineExceededError: the call's deadline passed first.
        """
        requests = running.requests
        num_tokens = sum(len(request.prompt) for request in requests)
        hashes = await self._long_work.run(num_tokens, _hash_blocks, requests, hello)
        for place, (request, names) in enumerate(zip(requests, hashes, strict=True), 1):
            await self._submit_one(traced(request), running, names)
            if not place % _REQUESTS_PER_PASS:
                await asyncio.sleep(0)
        for _ in range(_PASSES_TO_SEND):
            await asyncio.sleep(0)
        running.mark_submitted()

    async def _submit_one(
        self, request: Request, running: RunningCall, hashes: Sequence[BlockHash]
    ) -> None:
        deadline_s = running.deadline_s
        no_stream_s: float | None = None
        while True:
            now_s = time.monotonic()
            running.queue.check()
            can_go = self._readiness.check_serving()
            if can_go:
                entry = self._engines.assign(request, running.queue, deadline_s, hashes)
                if entry is not None:
                    running.set_submission(request.request_id, entry)
                    return
            if now_s >= deadline_s:
                waited = "" if can_go else ": the cluster is recovering"
                raise DeadlineExceededError(f"the request's deadline has passed{waited}", False)
            if not can_go:
                no_stream_s = None
                await self._cluster.wait_change(min(_POLL_S, deadline_s - now_s))
                continue
            no_stream_s = no_stream_s or now_s
            if now_s - no_stream_s > self._stream_wait_s:
                raise NotReadyError("no attention worker is ready", "not_ready", 2.0)
            await self._engines.wait_change(min(_POLL_S, deadline_s - now_s))


def _hash_blocks(
    requests: Sequence[Request], hello: EngineHello | None
) -> list[Sequence[BlockHash]]:
    """Return the KV block hashes of each request's prompt; empty if routing ignores cached blocks.

    ``hello`` describes the blocks; None if routing ignores cached blocks.
    """
    if hello is None or not hello.kv_block_size:
        return [() for _ in requests]
    size, limit = hello.kv_block_size, hello.kv_length_matters_above
    return [block_hashes(one, size, limit) for one in requests]
