"""An abort takes effect between two steps: no step is lost, no block is held for longer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.harness.serving_cluster import ThreadCluster, make_config, serving
from tests.harness.recorded_cluster import RecordedCluster
from workers.requests.request import FinishReason, Request, SamplingParams

NUM_BLOCKS = 16
BYTES_PER_BLOCK = 16 * 2 * 2 * 2 * 8 * 4
"""16 tokens, 2 layers, keys and values, 2 heads of 8 float32."""


@pytest.fixture
def cluster(tiny_checkpoint: Path) -> Iterator[RecordedCluster]:
    """1 attention and 2 expert workers whose KV memory holds one long request and no second one."""
    config = make_config(tiny_checkpoint, engine={"kv_cache_bytes": NUM_BLOCKS * BYTES_PER_BLOCK})
    cluster = RecordedCluster(config)
    with serving(cluster):
        yield cluster


def request(name: str, max_tokens: int) -> Request:
    """A prompt of 190 tokens, which takes 12 of the 16 blocks."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Request(request_id=name, prompt=tuple(range(2, 92)) * 2 + (5,) * 10, params=params)


def stats_of(cluster: ThreadCluster, name: str) -> dict[str, float]:
    """Numbers of one worker, of this moment."""
    (worker,) = [w for w in cluster.snapshot(fresh=True)["workers"] if w["name"] == name]
    stats: dict[str, float] = worker["stats"]
    return stats


def test_the_step_after_an_abort_uses_its_blocks(cluster: RecordedCluster) -> None:
    cluster.let_in(0, [0, 5, 5])
    stream = cluster.stream()
    stream.send(request("long", 60))
    stream.abort("long")
    stream.send(request("next", 3))  # fits only into the blocks of the other
    outputs = [stream.next()]
    while outputs[-1].finish_reason is None:
        outputs.append(stream.next())
    assert [o.request_id for o in outputs] == ["long"] * 5 + ["next"] * 3
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    stats = stats_of(cluster, "attention-0")
    assert stats["num_preemptions_total"] == 0
    assert stats["choices_abort_total"] == 1
    assert stats["kv_blocks_free"] == stats["kv_blocks_total"] == NUM_BLOCKS
    num_steps = len(outputs)  # one token in each, and none without
    cluster.wait(lambda _: stats_of(cluster, "expert-0")["steps_total"] >= num_steps)
    assert stats_of(cluster, "expert-0")["steps_total"] == num_steps
    stream.close()


def test_a_gateway_that_is_gone_leaves_nothing(cluster: RecordedCluster) -> None:
    cluster.let_in(0, [0, 0, 5])
    stream = cluster.stream()
    stream.send(request("long", 60))
    stream.send(request("waits", 60))
    stream.next()
    stream.close()
    cluster.wait(lambda _: stats_of(cluster, "attention-0")["choices_abort_total"] == 2)
    other = cluster.stream()
    other.finish([request("next", 3)])
    cluster.wait(lambda _: cluster.blocks_in_use() == 0)
    stats = stats_of(cluster, "attention-0")
    assert (stats["num_requests_running"], stats["num_requests_waiting"]) == (0, 0)
    assert stats["choices_abort_total"] == 2
    assert stats["choices_length_total"] == 1
    other.close()
