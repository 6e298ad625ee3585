"""KV events of two attention workers of a cluster, as a router reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness.distributed import free_ports
from benchmarks.harness.serving_cluster import ThreadCluster, make_config, serving
from benchmarks.harness.stalls import wait_until
from tests.harness.kv_subscriber import Subscriber
from tests.workers.kv.hashes import hashes_of
from tests.workers.kv.router_index import RouterIndex
from workers.requests.block_hash import SHORT_BYTES
from workers.requests.request import Request, SamplingParams

pytestmark = pytest.mark.distributed

PROMPT = tuple(range(3, 60))


def _two_free_runs() -> tuple[int, int]:
    """Two ports, each with a free one behind it."""
    while True:
        first, second = sorted(free_ports(2))
        if second - first > 1 and first < 65_000 and second < 65_000:
            return first, second


def _index_with(names: set[int], address: tuple[str, str], block_size: int) -> RouterIndex:
    """What a router knows as soon as it has the blocks of these names."""
    found = [RouterIndex(block_size)]

    def has_all() -> bool:
        found[0] = RouterIndex(block_size)
        for _, payload in subscriber.replayed(0):
            found[0].apply(payload)
        return found[0].blocks.keys() == names

    with Subscriber(*address) as subscriber:
        wait_until(has_all, "all blocks")
    return found[0]


def test_a_router_knows_what_each_attention_worker_has(tiny_checkpoint: Path) -> None:
    events, replay = _two_free_runs()
    config = make_config(
        tiny_checkpoint,
        num_attention=2,
        kv_events={
            "kv_events_endpoint": f"tcp://127.0.0.1:{events}",
            "kv_events_replay_endpoint": f"tcp://127.0.0.1:{replay}",
        },
    )
    cluster = ThreadCluster(config)
    with serving(cluster):
        for rank in range(2):
            stream = cluster.stream(rank)
            request = Request(
                request_id=f"r{rank}",
                prompt=PROMPT[rank:],
                params=SamplingParams(max_tokens=8, ignore_eos=True),
            )
            stream.finish([request])
            stream.close()
            engine = cluster.group.attention(f"attention-{rank}").engine
            names = {
                int.from_bytes(block_hash[:SHORT_BYTES], "big")
                for block_hash in hashes_of(engine.pool)
            }
            address = f"tcp://127.0.0.1:{events + rank}", f"tcp://127.0.0.1:{replay + rank}"
            index = _index_with(names, address, config.engine.block_size_tokens)
            assert index.ranks == {rank}
            assert len(index.blocks) == (len(PROMPT) - rank + 7) // 16
            assert all(
                tokens[: len(PROMPT) - rank] == PROMPT[rank:][: len(tokens)]
                for tokens in index.prefixes()
            )
