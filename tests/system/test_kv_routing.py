"""Requests go where their prefix is: the gateway's pool of streams on real attention workers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.harness.engine_stream import TIMEOUT_S, TOKEN
from benchmarks.harness.serving_cluster import ThreadCluster, make_config, serving
from cluster.core.errors import ExpertMeshError
from gateway.cluster.view import AttentionEndpoint
from gateway.engines.engine_pool import EnginePool
from gateway.engines.kv_index import KvIndex
from gateway.engines.router import RoutingPolicy
from workers.requests.block_hash import KvEvents, prompt_hashes
from workers.requests.request import Request, SamplingParams, TokenOutput

NUM_BLOCKS = 6
BLOCK = 16
PARAMS = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


class QueueSink:
    """One request's outputs."""

    def __init__(self) -> None:
        self.outputs: asyncio.Queue[TokenOutput | ExpertMeshError] = asyncio.Queue()

    def put(self, output: TokenOutput) -> None:
        self.outputs.put_nowait(output)

    def fail(self, error: ExpertMeshError) -> None:
        self.outputs.put_nowait(error)

    async def finish(self) -> int:
        """Wait for the end; returns the cached tokens."""
        cached = 0
        while True:
            output = await asyncio.wait_for(self.outputs.get(), TIMEOUT_S)
            assert isinstance(output, TokenOutput), output
            assert not output.error, output.error
            cached += output.num_cached_tokens or 0
            if output.finish_reason is not None:
                return cached


class Front:
    """An ``EnginePool`` over all attention workers of a cluster."""

    def __init__(
        self, cluster: ThreadCluster, policy: RoutingPolicy, name: str = "gateway"
    ) -> None:
        self.pool = EnginePool(TOKEN, name, policy)
        self._name = name
        self._workers = cluster.snapshot()["workers"]
        self._number = 0

    async def start(self, without: str = "") -> None:
        """Open the streams; drop the one to a worker that is gone."""
        ends = [
            AttentionEndpoint(w["name"], w["engine_address"], w["pid"])
            for w in self._workers
            if w["role"] == "attention" and w["name"] != without
        ]
        self.pool.update(ends)
        while len(self.pool.clients) < len(ends):
            await self.pool.wait_change(TIMEOUT_S)

    async def learn(self, prompt: list[int], count: int) -> None:
        """Wait until the index has this many blocks of a prompt: events may follow an answer."""
        request = Request(request_id="", prompt=tuple(prompt), params=PARAMS)
        names = prompt_hashes(request, BLOCK, None)
        end = asyncio.get_running_loop().time() + TIMEOUT_S
        while max(self.pool.kv.matches(names).values(), default=0) < count:
            assert asyncio.get_running_loop().time() < end, "the events never came"
            await asyncio.sleep(0.005)

    async def serve(self, prompt: list[int], salt: str = "") -> tuple[str, int]:
        """Serve one request; returns the worker, and how many tokens were cached there."""
        self._number += 1
        request = Request(
            request_id=f"{self._name}-{self._number}",
            prompt=tuple(prompt),
            params=PARAMS,
            cache_salt=salt,
        )
        sink = QueueSink()
        entry = self.pool.assign(request, sink, asyncio.get_running_loop().time() + TIMEOUT_S)
        assert entry is not None
        cached = await sink.finish()
        return entry.last_worker, cached


@pytest.fixture(scope="module")
def cluster(tiny_checkpoint: Path) -> Iterator[ThreadCluster]:
    config = make_config(tiny_checkpoint, num_attention=2, num_experts=1)
    threads = ThreadCluster(config)
    with serving(threads):
        yield threads


def chats(seed: int) -> list[list[int]]:
    """Prompts that have nothing in common."""
    draw = random.Random(seed)
    return [[draw.randrange(3, 96) for _ in range(NUM_BLOCKS * BLOCK)] for _ in range(3)]


def test_a_chat_stays_where_its_prefix_is(cluster: ThreadCluster) -> None:
    front = Front(cluster, RoutingPolicy.KV)

    async def work() -> None:
        await front.start()
        homes = []
        for prompt in chats(0):
            worker, cached = await front.serve(prompt)
            homes.append(worker)
            assert cached == 0
        for turn in range(1, 4):
            for prompt, home in zip(chats(0), homes, strict=True):
                longer = prompt + [turn] * BLOCK * turn
                worker, cached = await front.serve(longer)
                assert worker == home
                assert cached >= NUM_BLOCKS * BLOCK
        await front.pool.stop()

    cluster.thread.run(work())
    assert cluster.blocks_in_use() == 0


def test_a_gateway_that_comes_later_knows_the_prefixes_and_tenants_share_none(
    cluster: ThreadCluster,
) -> None:
    first, second = (Front(cluster, p) for p in (RoutingPolicy.ROUND_ROBIN, RoutingPolicy.KV))

    async def work() -> None:
        await first.start()
        homes = [(await first.serve(prompt))[0] for prompt in chats(1)]
        assert len(set(homes)) == 2
        await first.pool.stop()
        await second.start()
        for prompt, home in zip(chats(1), homes, strict=True):
            assert await second.serve([*prompt, 5]) == (home, NUM_BLOCKS * BLOCK)
            assert (await second.serve([*prompt, 5], salt="tenant"))[1] == 0
        await second.pool.stop()

    cluster.thread.run(work())


def skip_messages(index: KvIndex, worker: str, count: int) -> None:
    """As if so many of its next messages had come, and they say nothing."""
    for number in range(1, 1000):
        if count:
            count -= index.apply(worker, KvEvents(number=number))


def test_missed_events_are_asked_for(cluster: ThreadCluster) -> None:
    front = Front(cluster, RoutingPolicy.KV)

    async def work() -> None:
        await front.start()
        prompts = chats(2)
        homes = [(await front.serve(prompts[0]))[0]]
        for worker in front.pool.clients:
            skip_messages(front.pool.kv, worker.worker, 5)
        homes += [(await front.serve(prompt))[0] for prompt in prompts[1:]]
        for prompt, home in zip(prompts, homes, strict=True):
            assert await front.serve([*prompt, 5]) == (home, NUM_BLOCKS * BLOCK)
        await front.pool.stop()

    cluster.thread.run(work())


def test_replicas_know_what_was_computed_for_others(cluster: ThreadCluster) -> None:
    """A chat stays where its prefix is, whichever replica takes its turn."""
    fronts = [Front(cluster, RoutingPolicy.KV, name) for name in ("one", "other")]

    async def work() -> None:
        for front in fronts:
            await front.start()
        homes = []
        for turn in range(4):
            front = fronts[turn % 2]
            for number, prompt in enumerate(chats(4)):
                await front.learn(prompt, NUM_BLOCKS if turn else 0)
                worker, cached = await front.serve(prompt + [turn] * BLOCK * turn)
                homes += [worker] if not turn else []
                assert (worker, cached >= NUM_BLOCKS * BLOCK) == (homes[number], turn > 0)
        for front in fronts:
            await front.pool.stop()

    cluster.thread.run(work())


def test_blocks_of_a_worker_that_left_are_forgotten(cluster: ThreadCluster) -> None:
    front = Front(cluster, RoutingPolicy.KV)

    async def work() -> None:
        await front.start()
        (prompt, *_) = chats(5)
        home, _ = await front.serve(prompt)
        await front.start(without=home)
        worker, cached = await front.serve([*prompt, 5])
        assert worker != home
        assert cached == 0  # nor is it fetched from who is gone
        await front.start()  # it is back, with its blocks
        await front.learn(prompt, NUM_BLOCKS)
        assert (await front.serve([*prompt, 6]))[1] == NUM_BLOCKS * BLOCK
        await front.pool.stop()

    cluster.thread.run(work())


def test_requests_of_one_moment_are_spread_by_what_was_just_routed(cluster: ThreadCluster) -> None:
    front = Front(cluster, RoutingPolicy.KV)

    async def work() -> list[tuple[str, int]]:
        await front.start()
        one, other, _ = chats(3)
        asked = [one, other, [*one, 7], [*other, 7]]
        found = await asyncio.gather(*(front.serve(prompt) for prompt in asked))
        await front.pool.stop()
        return found

    workers = [worker for worker, _ in cluster.thread.run(work())]
    assert workers[0] != workers[1]
    assert workers[2:] == workers[:2]
