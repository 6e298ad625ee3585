"""A client that sends requests through the gateway's pool of engine streams and its policy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from time import perf_counter
from types import TracebackType
from typing import Self

from benchmarks.harness.ray_serving import TOKEN
from cluster.core.errors import ExpertMeshError
from expertmesh.loop_thread import LoopThread
from gateway.cluster.view import AttentionEndpoint
from gateway.engines.engine_pool import EnginePool
from gateway.engines.router import RoutingPolicy
from workers.requests.request import Request, SamplingParams, TokenOutput

_LIMIT_S = 120.0


class _Times:
    """Arrival times of one request's tokens."""

    def __init__(self, start: float) -> None:
        self.seconds: list[float] = []
        self.end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._start = start

    def put(self, output: TokenOutput) -> None:
        """See ``OutputSink``."""
        self.seconds += [perf_counter() - self._start] * len(output.token_ids)
        if output.error:
            self.end.set_exception(RuntimeError(output.error))
        elif output.finish_reason is not None:
            self.end.set_result(None)

    def fail(self, error: ExpertMeshError) -> None:
        """See ``OutputSink``."""
        self.end.set_exception(error)


class PoolClient:
    """An ``EnginePool`` on an event loop in a separate thread."""

    def __init__(self, addresses: Sequence[str], policy: RoutingPolicy) -> None:
        self._endpoints = [
            AttentionEndpoint(f"attention-{i}", address, i) for i, address in enumerate(addresses)
        ]
        self._policy = policy
        self._num_batches = 0

    def __enter__(self) -> Self:
        self._thread = LoopThread(_LIMIT_S)
        self._thread.run(self._start())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.run(self._pool.stop())
        self._thread.close()

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[float]]:
        """Run prompts; returns the seconds to each token. Raises ``RuntimeError`` if one fails."""
        return self._thread.run(self._generate(prompts, new_tokens))

    async def _start(self) -> None:
        self._pool = EnginePool(TOKEN, "bench", self._policy)
        self._pool.update(self._endpoints)
        while len(self._pool.clients) < len(self._endpoints):
            await self._pool.wait_change(_LIMIT_S)

    async def _generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[float]]:
        self._num_batches += 1
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        start, deadline_s = perf_counter(), time.monotonic() + _LIMIT_S
        all_times = []
        for i, prompt in enumerate(prompts):
            request = Request(
                request_id=f"{self._num_batches}-{i}", prompt=tuple(prompt), params=params
            )
            times = _Times(start)
            self._pool.assign(request, times, deadline_s)
            all_times.append(times)
        await asyncio.gather(*(times.end for times in all_times))
        return [times.seconds for times in all_times]
