"""A real gateway, without its codecs, in front of a cluster of threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gateway.call import GenerateFields
from gateway.cluster_view import ClusterView
from gateway.core import Gateway
from gateway.delta import ChoiceDelta
from gateway.engine_pool import EnginePool
from gateway.generation import Generation
from gateway.text import TokenText
from gateway.tokenizer import load_tokenizer
from tests.engine_stream import TOKEN
from tests.serving_cluster import ThreadCluster
from workers.request import FinishReason

LIMIT_S = 120.0

Result = TypeVar("Result")


@dataclass(slots=True)
class Answer:
    """What a client gets of one choice."""

    text: str = ""
    tokens: list[TokenText] = field(default_factory=list)
    reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_tokens: int = 0

    def add(self, delta: ChoiceDelta) -> None:
        """Take the next news in."""
        assert self.reason is None, "news after the end"
        self.text += delta.text
        self.tokens += delta.tokens
        if delta.finish is not None:
            self.reason, self.stop_reason = delta.finish.reason, delta.finish.stop_reason
            self.num_tokens = delta.finish.usage.completion_tokens


class ClusterGateway:
    """Calls in, answers out; everything runs on the controller's event loop."""

    def __init__(self, cluster: ThreadCluster) -> None:
        self._loop = cluster._loop
        self._cluster = cluster

    async def start(self) -> None:
        """Follow the controller, and open the streams."""
        config = self._cluster.config

        async def find() -> Any:
            return self._cluster._actor

        self._view = ClusterView(find)
        self._engines = EnginePool(TOKEN, "gateway")
        tokenizer = load_tokenizer(config.model.path)
        self._gateway = Gateway(config, tokenizer, self._view, self._engines, "gateway")
        self._view.start()
        while self._gateway.not_ready_reasons() or not self._gateway.facts:
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """End the streams."""
        self._view.stop()
        await self._engines.stop()

    def answer(
        self, calls: Sequence[GenerateFields], begun: Callable[[], None] = lambda: None
    ) -> list[Answer]:
        """Serve calls together, each of one prompt and one choice, to their ends.

        ``begun`` is called when all of them have been handed over.
        """

        async def work() -> list[Answer]:
            running = [
                await self._gateway.start(call, f"call-{i}", LIMIT_S)
                for i, call in enumerate(calls)
            ]
            begun()
            return list(await asyncio.gather(*map(_collect, running)))

        return self.run(work())

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine on the loop, from another thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(LIMIT_S)


async def _collect(generation: Generation) -> Answer:
    answer = Answer()
    with generation:
        while not generation.is_finished:
            for delta in await generation.next():
                answer.add(delta)
    return answer


@contextmanager
def gateway_of(cluster: ThreadCluster) -> Iterator[ClusterGateway]:
    """A gateway for the length of a ``with`` block."""
    gateway = ClusterGateway(cluster)
    gateway.run(gateway.start())
    try:
        yield gateway
    finally:
        gateway.run(gateway.stop())
