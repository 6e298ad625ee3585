"""Prefixes that the pool has given up come back from lower tiers, in whole clusters."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from benchmarks.harness.engine_stream import TIMEOUT_S
from benchmarks.harness.serving_cluster import (
    ThreadCluster,
    ThreadWorkerGroup,
    make_config,
    serving,
)
from benchmarks.harness.stalls import wait_until
from gateway.engines.router import RoutingPolicy
from tests.reference.exact import exact
from tests.system.test_kv_fetch import (
    CACHED,
    ENGINE,
    EagerWorker,
    answer,
    request_of,
    wait_idle,
)
from tests.system.test_kv_routing import Front
from workers.kv.tiers.tiers import TierItem
from workers.process.roles.attention import AttentionRole
from workers.requests.request import FinishReason

MIB = 2**20
NUM_BLOCKS = 16
"""Blocks of the pool: two prompts and their answers."""


@pytest.fixture(scope="module")
def cluster(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ThreadCluster]:
    folder = tmp_path_factory.mktemp("kv")
    tiers = {"kv_host_bytes": 64 * 1024, "kv_disk_bytes": 16 * MIB, "kv_disk_dir": str(folder)}
    block_bytes = 16 * 2 * 2 * 2 * 8 * 4
    engine = {**ENGINE, "kv_cache_bytes": NUM_BLOCKS * block_bytes}
    config = make_config(
        tiny_checkpoint, num_attention=2, num_experts=1, engine=engine, kv_tiers=tiers
    )
    threads = ThreadCluster(config, ThreadWorkerGroup(by_role={"attention": EagerWorker}))
    with serving(threads):
        yield threads


def role_of(cluster: ThreadCluster, rank: int) -> AttentionRole:
    return cluster.group.attention(f"attention-{rank}")


def settle(cluster: ThreadCluster, rank: int) -> None:
    """Wait until all that was left is in the tiers."""
    tiers = role_of(cluster, rank).tiers
    assert tiers is not None
    wait_until(lambda: tiers.copies.is_idle, "copies of KV blocks")
    assert tiers.tiers.wait_written(60.0)


def evict(cluster: ThreadCluster, rank: int, first: int) -> None:
    """Other prompts take the pool's blocks."""
    for seed in range(first, first + 4):
        answer(cluster, rank, request_of(seed))
        settle(cluster, rank)


def restored(cluster: ThreadCluster, rank: int, tier: str) -> float:
    stats = role_of(cluster, rank).stats()
    return stats[f'kv_restore_tokens_total{{tier="{tier}"}}']


def test_a_prompt_comes_back_from_host_memory_and_from_disk(cluster: ThreadCluster) -> None:
    expected = exact(answer(cluster, 0, request_of(100)))
    settle(cluster, 0)
    evict(cluster, 0, 110)
    again = answer(cluster, 0, request_of(100, 1))
    assert again[0].num_cached_tokens == CACHED
    assert exact(again) == expected
    assert restored(cluster, 0, "host") + restored(cluster, 0, "disk") == CACHED
    settle(cluster, 0)
    for first in (120, 130):
        evict(cluster, 0, first)
    before = restored(cluster, 0, "disk")
    again = answer(cluster, 0, request_of(100, 2))
    assert again[0].num_cached_tokens == CACHED
    assert exact(again) == expected
    assert restored(cluster, 0, "disk") > before
    wait_idle(cluster)


def test_a_request_that_waits_for_room_is_restored_when_there_is_some(
    cluster: ThreadCluster,
) -> None:
    """Others hold the pool when it comes: nothing can be restored before they end."""
    expected = exact(answer(cluster, 0, request_of(500)))
    settle(cluster, 0)
    evict(cluster, 0, 510)
    stream = cluster.stream(0)
    longer = replace(request_of(500).params, max_tokens=12)  # 7 of 16 blocks each
    others = [request_of(seed, params=longer) for seed in (520, 521)]
    for other in others:
        stream.send(other)
    seen = [stream.next()]
    while len({output.request_id for output in seen}) < len(others):
        seen.append(stream.next())
    again = request_of(500, 1)
    stream.send(again)
    stream.put_back(seen)
    found = stream.collect([*others, again])[again.request_id].outputs
    stream.close()
    assert found[0].num_cached_tokens == CACHED
    assert exact(found) == expected
    wait_idle(cluster)


def test_a_request_that_preempts_others_is_restored(cluster: ThreadCluster) -> None:
    """Lower priorities hold the pool, and do not end before its blocks are there."""
    expected = exact(answer(cluster, 0, request_of(700)))
    settle(cluster, 0)
    evict(cluster, 0, 710)
    stream = cluster.stream(0)
    longer = replace(request_of(700).params, max_tokens=12)  # 7 of 16 blocks each
    others = [replace(request_of(seed, params=longer), priority=1) for seed in (720, 721)]
    for other in others:
        stream.send(other)
    seen = [stream.next()]
    while len({output.request_id for output in seen}) < len(others):
        seen.append(stream.next())
    before = role_of(cluster, 0).stats()["num_preemptions_total"]
    again = request_of(700, 1)
    stream.send(again)
    stream.put_back(seen)
    found = stream.collect([*others, again])[again.request_id].outputs
    stream.close()
    assert found[0].num_cached_tokens == CACHED
    assert exact(found) == expected
    assert role_of(cluster, 0).stats()["num_preemptions_total"] > before
    wait_idle(cluster)


def test_the_same_request_again_does_not_hold_up_the_first_one(
    cluster: ThreadCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused while the first one waits for its blocks."""
    expected = exact(answer(cluster, 0, request_of(600)))
    settle(cluster, 0)
    evict(cluster, 0, 610)
    may_read = hold_reads(cluster, monkeypatch)
    stream = cluster.stream(0)
    again = request_of(600, 1)
    stream.send(again)
    wait_until(lambda: waiting_for_kv(cluster) == 1, "a restore")
    stream.send(again)
    refusal = stream.next()
    assert refusal.finish_reason is FinishReason.ERROR
    assert "is already here" in str(refusal.error)
    may_read.set()
    outputs = stream.collect([again])[again.request_id].outputs
    stream.close()
    assert exact(outputs) == expected
    wait_idle(cluster)


def test_a_request_that_shares_a_beginning_gets_the_rest_as_well(
    cluster: ThreadCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both begin at once: what is on its way for the first one is not all that the second has."""
    first = request_of(700)
    middle = CACHED // 2
    second = request_of(701, prompt=(*first.prompt[:middle], *request_of(701).prompt[middle:]))
    expected = [exact(answer(cluster, 0, request)) for request in (first, second)]
    settle(cluster, 0)
    evict(cluster, 0, 710)
    may_read = hold_reads(cluster, monkeypatch)
    again = [replace(request, request_id=f"{request.request_id}-1") for request in (first, second)]
    stream = cluster.stream(0)
    for request in again:
        stream.send(request)
    wait_until(lambda: waiting_for_kv(cluster) == 2, "two that wait")
    may_read.set()
    results = stream.collect(again)
    stream.close()
    found = [results[request.request_id].outputs for request in again]
    assert [outputs[0].num_cached_tokens for outputs in found] == [CACHED, CACHED]
    assert [exact(outputs) for outputs in found] == expected
    wait_idle(cluster)


def hold_reads(cluster: ThreadCluster, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The first worker reads nothing from its tiers before this is set."""
    lower, may_read = role_of(cluster, 0).tiers, threading.Event()
    assert lower is not None
    read = lower.tiers.read

    def slow(name: bytes) -> TierItem | None:
        assert may_read.wait(TIMEOUT_S)
        return read(name)

    monkeypatch.setattr(lower.tiers, "read", slow)
    return may_read


def waiting_for_kv(cluster: ThreadCluster) -> float:
    return role_of(cluster, 0).stats()['num_requests_waiting_by_reason{reason="kv"}']


def test_a_peer_fetches_what_only_a_tier_has(cluster: ThreadCluster) -> None:
    expected = exact(answer(cluster, 0, request_of(200)))
    settle(cluster, 0)
    evict(cluster, 0, 210)
    other = answer(cluster, 1, request_of(200, 1, kv_peer="attention-0"))
    assert other[0].num_cached_tokens == CACHED
    assert exact(other) == expected
    wait_idle(cluster)


def test_gateways_know_what_only_a_tier_has(cluster: ThreadCluster) -> None:
    answer(cluster, 1, request_of(300))
    settle(cluster, 1)
    evict(cluster, 1, 310)
    front = Front(cluster, RoutingPolicy.KV)
    prompt = [*request_of(300).prompt, 5]

    async def work() -> None:
        await front.start()
        await front.learn(prompt, CACHED // 16)
        assert await front.serve(prompt) == ("attention-1", CACHED)
        await front.pool.stop()

    cluster.thread.run(work())
    wait_idle(cluster)


def test_an_aborted_request_leaves_nothing_behind(cluster: ThreadCluster) -> None:
    answer(cluster, 0, request_of(400))
    settle(cluster, 0)
    evict(cluster, 0, 410)
    stream = cluster.stream(0)
    request = request_of(400, 1, params=replace(request_of(400).params, max_tokens=20))
    stream.send(request)
    stream.abort(request.request_id)
    stream.close()
    wait_idle(cluster)
    assert answer(cluster, 0, request_of(400, 2))[0].num_cached_tokens == CACHED
