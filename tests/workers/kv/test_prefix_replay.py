"""A chat service's block ids, replayed through the pool alone: no worse than an ideal LRU."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import pytest

from benchmarks.simulated.request_trace import conversations
from tests.workers.kv.hashes import hashes_of
from workers.kv.block_pool import BlockPool

MAX_LOSS = 0.001
"""Of the hit rate; blocks that were found before stay longer, which pays."""


@pytest.fixture(scope="module")
def requests() -> list[list[int]]:
    """Block ids of each request."""
    return [list(request.blocks) for request in conversations()]


def pool_hits(requests: Sequence[Sequence[int]], num_blocks: int) -> int:
    """Blocks that requests find, served one after the other."""
    pool, hits = BlockPool(num_blocks), 0
    for ids in requests:
        hashes = [i.to_bytes(32, "big") for i in ids]
        table = pool.find(hashes)
        hits += len(table)
        pool.share(table)
        table += pool.allocate(len(ids) - len(table))
        parents = (None, *hashes[:-1])
        for block, block_hash, parent in zip(table, hashes, parents, strict=True):
            pool.store(block, block_hash, parent)
        pool.release(table)
    pool.check_integrity([])
    assert len(hashes_of(pool)) == min(num_blocks, len({i for ids in requests for i in ids}))
    return hits


def ideal_hits(requests: Sequence[Sequence[int]], num_blocks: int) -> int:
    """The same of a plain LRU over single block ids."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for i in (i for ids in requests for i in ids):
        if i in cache:
            hits += 1
            cache.move_to_end(i)
            continue
        cache[i] = None
        if len(cache) > num_blocks:
            cache.popitem(last=False)
    return hits


def test_the_trace_is_whole(requests: list[list[int]]) -> None:
    assert (len(requests), sum(map(len, requests))) == (12_031, 288_500)
    assert requests[5][:3] == [0, 59, 60]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_blocks", "hit_rate"),
    [(500, 0.042), (2500, 0.062), (10_000, 0.216), (30_000, 0.329), (100_000, 0.363)],
)
def test_requests_find_no_less_than_an_ideal_lru_of_the_same_size_holds(
    requests: list[list[int]], num_blocks: int, hit_rate: float
) -> None:
    total = sum(map(len, requests))
    found, ideal = pool_hits(requests, num_blocks) / total, ideal_hits(requests, num_blocks) / total
    assert found > ideal - MAX_LOSS
    assert found == pytest.approx(hit_rate, abs=0.001)
