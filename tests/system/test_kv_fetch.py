"""Attention workers fetch prefixes from each other, in whole clusters over real sockets."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from benchmarks.harness.engine_stream import TIMEOUT_S
from benchmarks.harness.serving_cluster import (
    RayCluster,
    ServingCluster,
    ThreadCluster,
    ThreadWorkerGroup,
    connected_ray,
    make_config,
    serving,
)
from benchmarks.harness.stalls import wait_until
from gateway.engines.router import RoutingPolicy
from tests.reference.exact import exact
from tests.reference.goldens import Golden
from tests.system.test_kv_routing import Front
from workers.kv.transfer.fetch_cost import FetchCost
from workers.process.context import WorkerContext
from workers.process.worker.worker import Worker
from workers.requests.request import FinishReason, Request, SamplingParams, TokenOutput

PROMPT_TOKENS = 100
CACHED = 96
"""Tokens of the full blocks of such a prompt."""
PARAMS = SamplingParams(max_tokens=4, temperature=0.0, logprobs=2, ignore_eos=True)
ENGINE = {"deterministic": "on", "kv_fetch_limit_s": TIMEOUT_S}


class CheapFetches(FetchCost):
    """Fetching pays, however busy this machine is."""

    def ratio(self, now_s: float) -> float:
        return 0.01


class EagerWorker(Worker):
    """An attention worker that fetches wherever it can."""

    def load(self, context: WorkerContext) -> dict[str, Any]:
        info = super().load(context)
        assert self.roles.attention is not None
        self.roles.attention.fetches.cost = CheapFetches()
        return info

    def stop_lending(self) -> None:
        """Its blocks cannot be reached."""
        self._listeners.kv_server.close()


def eager(path: Path, **model: Any) -> ThreadCluster:
    """Two attention workers and one expert worker."""
    config = make_config(path, num_attention=2, num_experts=1, engine=ENGINE, **model)
    return ThreadCluster(config, ThreadWorkerGroup(by_role={"attention": EagerWorker}))


@pytest.fixture(scope="module")
def cluster(tiny_checkpoint: Path) -> Iterator[ThreadCluster]:
    with serving(eager(tiny_checkpoint)) as threads:
        assert isinstance(threads, ThreadCluster)
        yield threads


def request_of(seed: int, number: int = 0, **more: object) -> Request:
    draw = random.Random(seed)
    prompt = tuple(draw.randrange(3, 96) for _ in range(PROMPT_TOKENS))
    request = Request(request_id=f"r{seed}-{number}", prompt=prompt, params=PARAMS)
    return replace(request, **more)


def answers(
    cluster: ServingCluster, rank: int, requests: Sequence[Request]
) -> list[list[TokenOutput]]:
    stream = cluster.stream(rank)
    found = stream.finish(requests)
    stream.close()
    return [found[request.request_id].outputs for request in requests]


def answer(cluster: ServingCluster, rank: int, request: Request) -> list[TokenOutput]:
    return answers(cluster, rank, [request])[0]


def wait_idle(cluster: ServingCluster) -> None:
    """Wait until no request holds a block: loans end a moment after they are used."""
    wait_until(lambda: not cluster.blocks_in_use(), "blocks that leak")


def check_fetch(cluster: ServingCluster, seed: int = 0) -> None:
    """What one worker has computed, the other one has fetched, with the same bits."""
    first = answer(cluster, 0, request_of(seed))
    assert first[0].num_cached_tokens == 0
    second = answer(cluster, 1, request_of(seed, 1, kv_peer="attention-0"))
    assert second[0].num_cached_tokens == CACHED
    assert exact(second) == exact(first)
    wait_idle(cluster)
    (entry,) = [w for w in cluster.snapshot(True)["workers"] if w["name"] == "attention-1"]
    assert entry["stats"]['kv_migration_seconds_count{reason="prefix"}'] >= 1
    assert entry["stats"]['kv_migration_bytes_total{reason="prefix"}'] > 0


def test_a_worker_fetches_what_its_peer_has_computed(cluster: ThreadCluster) -> None:
    check_fetch(cluster)


def test_tenants_fetch_nothing_of_each_other(cluster: ThreadCluster) -> None:
    answer(cluster, 0, request_of(1))
    other = request_of(1, 1, kv_peer="attention-0", cache_salt="tenant")
    assert answer(cluster, 1, other)[0].num_cached_tokens == 0


@pytest.mark.parametrize("peer", ["attention-0", "attention-1", "attention-9", "expert-0"])
def test_a_peer_that_has_nothing_or_is_none_does_no_harm(cluster: ThreadCluster, peer: str) -> None:
    seed = 10 + len(peer) + int(peer[-1])
    outputs = answer(cluster, 1, request_of(seed, kv_peer=peer))
    assert outputs[0].num_cached_tokens == 0
    assert exact(outputs) == exact(answer(cluster, 0, request_of(seed, 1)))


def test_many_fetch_the_same_and_one_is_given_up(cluster: ThreadCluster) -> None:
    answer(cluster, 0, request_of(2))
    stream = cluster.stream(1)
    requests = [request_of(2, i, kv_peer="attention-0") for i in range(1, 8)]
    for request in requests:
        stream.send(request)
    stream.abort(requests[3].request_id)
    found = stream.collect([r for r in requests if r is not requests[3]])
    stream.close()
    assert {result.reasons[0] for result in found.values()} == {FinishReason.LENGTH}
    tokens = {tuple(result.tokens[0]) for result in found.values()}
    assert len(tokens) == 1
    wait_idle(cluster)


def test_the_gateway_sends_to_an_idle_worker_which_fetches(cluster: ThreadCluster) -> None:
    front = Front(cluster, RoutingPolicy.KV)
    prompt = list(request_of(3).prompt)

    async def work() -> None:
        await front.start()
        home, cached = await front.serve(prompt)
        assert cached == 0
        assert await front.serve([*prompt, 5]) == (home, CACHED)
        (busy,) = [client for client in front.pool.clients if client.worker == home]
        (idle,) = [client for client in front.pool.clients if client is not busy]
        while idle.load.fetch_cost > 1:  # comes after the hello
            await asyncio.sleep(0.005)
        busy.load.queued_tokens += 10_000  # as if long prompts waited there
        worker, cached = await front.serve([*prompt, 6])
        assert worker != home
        assert cached == CACHED
        await front.pool.stop()

    cluster.thread.run(work())
    wait_idle(cluster)


def test_a_peer_that_died_does_no_harm(tiny_checkpoint: Path) -> None:
    threads = eager(tiny_checkpoint)
    with serving(threads):
        answer(threads, 0, request_of(4))
        worker = threads.group.workers["attention-0"]
        assert isinstance(worker, EagerWorker)
        worker.stop_lending()
        outputs = answer(threads, 1, request_of(4, 1, kv_peer="attention-0"))
        assert outputs[0].num_cached_tokens == 0
        wait_idle(threads)


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        *("olmoe-base", "dots1-groups", "jetmoe-tied", "qwen3moe-base", "gptoss-base"),
        "qwen3next-base",
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_families_fetch_the_same_bits(
    golden: Callable[[str], Golden], variant: str, dtype: str
) -> None:
    with serving(eager(golden(variant).path, dtype=dtype)) as threads:
        check_fetch(threads)


@pytest.mark.ray
@pytest.mark.slow
def test_workers_in_processes_of_their_own_fetch(tiny_checkpoint: Path) -> None:
    config = make_config(tiny_checkpoint, num_attention=2, num_experts=1, engine=ENGINE)
    with connected_ray(), serving(RayCluster(config)) as cluster:
        check_fetch(cluster)
