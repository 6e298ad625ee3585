"""A real gateway, without its codecs, in front of a cluster of threads or of Ray actors."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from benchmarks.harness.engine_stream import TOKEN
from benchmarks.harness.serving_cluster import ServingCluster, ThreadCluster
from expertmesh.loop_thread import LoopThread
from gateway.calls.gateway import Gateway
from gateway.calls.running_call import RunningCall
from gateway.cluster.client import find_controller
from gateway.cluster.view import (
    ControllerCall,
    ControllerCalls,
    SnapshotFollower,
    attention_endpoints,
)
from gateway.core.call import GenerateCall
from gateway.core.delta import ChoiceDelta, TokenText
from gateway.engines.engine_pool import EnginePool
from gateway.engines.submission import Submission
from gateway.text.tokenizer import load_tokenizer
from workers.requests.request import FinishReason

LIMIT_S = 300.0

Result = TypeVar("Result")


@dataclass(slots=True)
class Answer:
    """Output of one choice as a client receives it."""

    text: str = ""
    tokens: list[TokenText] = field(default_factory=list)
    reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_tokens: int = 0
    cached_tokens: int | None = field(default=None, compare=False)
    """Number of cached prompt tokens."""
    times: list[float] = field(default_factory=list, compare=False)
    """Monotonic times of the deltas."""

    def add(self, delta: ChoiceDelta) -> None:
        """Add the next delta."""
        assert self.reason is None, "a delta after the end"
        self.times.append(time.monotonic())
        self.text += delta.text
        self.tokens += delta.tokens
        if delta.finish is not None:
            self.reason, self.stop_reason = delta.finish.reason, delta.finish.stop_reason
            self.num_tokens = delta.finish.usage.completion_tokens
            self.cached_tokens = delta.finish.usage.cached_tokens


class _LocalController:
    """``ControllerCalls`` of a cluster within this process."""

    def __init__(self, cluster: ThreadCluster) -> None:
        self._cluster = cluster

    async def call(self, call: ControllerCall, *details: Any) -> Any:
        """Call a method of the controller and return its result."""
        return await getattr(self._cluster.actor, call)(*details)


class ClusterGateway:
    """Runs calls and returns their outputs, on the event loop of a ``ThreadCluster``."""

    def __init__(self, cluster: ServingCluster, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._cluster = cluster
        self.num_resubmitted = 0
        """Number of requests that moved to another worker."""

    async def start(self) -> None:
        """Follow the controller, and open the streams."""
        config = self._cluster.config

        async def find() -> ControllerCalls:
            if isinstance(self._cluster, ThreadCluster):
                return _LocalController(self._cluster)
            return await find_controller()

        self._view = SnapshotFollower(find)
        self._engines = EnginePool(TOKEN, "gateway")
        tokenizer = load_tokenizer(config.model.path)
        self._gateway = Gateway(config, tokenizer, self._view, self._engines, "gateway")
        self._engines.on_resubmit = self._count_resubmitted
        self._view.start()
        while self._gateway.readiness.not_ready_reasons() or not self._has_all_streams():
            await asyncio.sleep(0.01)

    @property
    def core(self) -> Gateway:
        """The gateway's core, which the codecs use."""
        return self._gateway

    async def stop(self) -> None:
        """End the streams."""
        self._view.stop()
        await self._engines.stop()

    def _has_all_streams(self) -> bool:
        """To every attention worker, so that each gets its share of what is asked first."""
        expected = attention_endpoints(self._view.snapshot or {})
        return len(self._engines.clients) == len(expected) and self._gateway.model.facts is not None

    @property
    def engines(self) -> EnginePool:
        """The streams to attention workers; to be changed on the event loop only."""
        return self._engines

    @property
    def gateway(self) -> Gateway:
        """The gateway itself; only for coroutines that ``run`` runs."""
        return self._gateway

    def _count_resubmitted(self, entry: Submission) -> None:
        self.num_resubmitted += 1

    def answer(
        self, calls: Sequence[GenerateCall], begun: Callable[[], None] = lambda: None
    ) -> list[Answer]:
        """Serve calls together, each of one prompt and one choice, to their ends.

        ``begun`` is called when all of them have been handed over.
        """
        streams = self.stream(calls)
        begun()
        return streams.finish()

    async def begin(self, call: GenerateCall, name: str) -> RunningCall:
        """Start a call of one prompt and one choice (on the event loop)."""
        return await self._gateway.start(replace(call, timeout_s=LIMIT_S), name)

    async def serve(self, call: GenerateCall, name: str) -> Answer:
        """Serve a call of one prompt and one choice to its end (on the event loop)."""
        streams = Streams([Answer()])
        await streams.collect([await self.begin(call, name)])
        return streams.answers[0]

    def spawn(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Start a coroutine on the loop, from another thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def stream(self, calls: Sequence[GenerateCall], name: str = "call") -> Streams:
        """Start calls, each of one prompt and one choice; all are submitted at the return.

        Calls that are under way at the same time need another ``name``.
        """

        async def begin() -> list[RunningCall]:
            return [await self.begin(call, f"{name}-{i}") for i, call in enumerate(calls)]

        streams = Streams([Answer() for _ in calls])
        begun = self.run(begin())
        streams.ends = self.spawn(streams.collect(begun))
        return streams

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine on the loop, from another thread."""
        return self.spawn(work).result(LIMIT_S)


class Streams:
    """Running calls."""

    def __init__(self, answers: list[Answer]) -> None:
        self.answers = answers
        """Outputs received so far; the event loop adds to them."""
        self.ends: Future[None] | None = None
        """Done when all have ended, with the first error."""
        self._changed = threading.Condition()

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all calls so far."""
        return sum(len(answer.tokens) for answer in self.answers)

    def wait_tokens(self, count: int) -> None:
        """Wait for a number of tokens. Raises the error that ends a stream before."""
        with self._changed:
            is_there = self._changed.wait_for(
                lambda: self.num_tokens >= count or (self.ends is not None and self.ends.done()),
                LIMIT_S,
            )
        if self.ends is not None and self.ends.done():
            self.ends.result()
        assert is_there, f"{self.num_tokens} of {count} tokens came"

    def finish(self) -> list[Answer]:
        """Wait for all outputs. Raises the error that ended a stream."""
        assert self.ends is not None
        self.ends.result(LIMIT_S)
        return self.answers

    async def collect(self, running: Sequence[RunningCall]) -> None:
        """Collect deltas until all calls have ended."""
        pairs = zip(running, self.answers, strict=True)
        try:
            await asyncio.gather(*(self._collect(*pair) for pair in pairs))
        finally:
            with self._changed:
                self._changed.notify_all()

    async def _collect(self, generation: RunningCall, answer: Answer) -> None:
        with generation:
            while not generation.is_finished:
                for delta in await generation.next():
                    answer.add(delta)
                with self._changed:
                    self._changed.notify_all()


@contextmanager
def gateway_of(cluster: ServingCluster) -> Iterator[ClusterGateway]:
    """Yield a gateway for the duration of a ``with`` block."""
    if isinstance(cluster, ThreadCluster):
        with _running_gateway(cluster, cluster.loop) as gateway:
            yield gateway
        return
    thread = LoopThread(LIMIT_S)
    try:
        with _running_gateway(cluster, thread.loop) as gateway:
            yield gateway
    finally:
        thread.close()


@contextmanager
def _running_gateway(
    cluster: ServingCluster, loop: asyncio.AbstractEventLoop
) -> Iterator[ClusterGateway]:
    gateway = ClusterGateway(cluster, loop)
    gateway.run(gateway.start())
    try:
        yield gateway
    finally:
        gateway.run(gateway.stop())
