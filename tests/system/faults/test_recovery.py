"""The recovery path: a worker with experts dies, and no stream of the others notices."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cluster.config.cluster import ClusterConfig
from cluster.launch.model_source import bundled_checkpoint
from tests.harness.engine_stream import EngineStream
from tests.harness.fault_rows import DETECTION_LIMIT_S
from tests.harness.serving_cluster import (
    RayCluster,
    ServingCluster,
    ThreadCluster,
    connected_ray,
    make_config,
    serving,
)
from workers.requests.request import FinishReason, Request, SamplingParams

NUM_STREAMS = 8


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with connected_ray():
        yield


def three_expert_workers() -> ClusterConfig:
    """22 spare slots a bank: every one of the 64 experts has a copy on another worker."""
    return make_config(
        bundled_checkpoint(),
        1,
        3,
        workers={"num_redundant_experts": 22},
        engine={"deterministic": True},
        transport={"detection_limit_s": DETECTION_LIMIT_S},
        dtype="float32",
    )


def requests(num_tokens: int, prefix: str) -> list[Request]:
    """Greedy and sampled, short and long prompts."""
    kinds: tuple[dict[str, Any], ...] = (
        {"temperature": 0.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.0, "repetition_penalty": 1.2},
        {"temperature": 0.8, "top_k": 20},
    )
    return [
        Request(
            request_id=f"{prefix}-{i}",
            prompt=tuple(range(10 + i, 20 + 9 * i)),
            params=SamplingParams(
                max_tokens=num_tokens, ignore_eos=True, seed=100 + i, **kinds[i % len(kinds)]
            ),
        )
        for i in range(NUM_STREAMS)
    ]


def wait_for_tokens(stream: EngineStream, count: int) -> None:
    """Wait for this number of outputs; they are put back for the collector."""
    seen = [stream.next() for _ in range(count)]
    stream.put_back(seen)


@pytest.mark.ray
@pytest.mark.parametrize(
    "num_tokens", [64, pytest.param(200, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_killing_an_expert_worker_with_copies_changes_no_stream(
    local_ray: None, num_tokens: int
) -> None:
    with serving(RayCluster(three_expert_workers())) as cluster:
        stream = cluster.stream()
        undisturbed = stream.finish(requests(num_tokens, "calm"))
        disturbed = requests(num_tokens, "hit")
        for request in disturbed:
            stream.send(request)
        wait_for_tokens(stream, NUM_STREAMS * num_tokens // 4)
        os.kill(cluster.worker("expert-1")["pid"], signal.SIGKILL)
        results = stream.collect(disturbed)
        snapshot = cluster.wait(lambda s: s["generation"] >= 3 and s["state"] == "SERVING")
        assert cluster.worker("expert-1")["state"] == "LOST"
        loss, gain = snapshot["history"][1:]
        assert "expert-1" in loss["cause"]
        assert "go on with 1 attention and 2 expert workers" in loss["effect"]
        assert gain["cause"] == "expert-1.2 is ready"
        for calm, hit in zip(undisturbed.values(), results.values(), strict=True):
            assert hit.tokens == calm.tokens
            assert hit.reasons == [FinishReason.LENGTH]
            assert len(hit.tokens[0]) == num_tokens
        assert cluster.blocks_in_use() == 0
        stream.close()


def three_colocated_workers() -> ClusterConfig:
    """The same spare slots, on workers that hold requests too."""
    return make_config(
        bundled_checkpoint(),
        num_experts=3,
        workers={"mode": "colocated", "num_redundant_experts": 22},
        engine={"deterministic": True},
        transport={"detection_limit_s": DETECTION_LIMIT_S},
        dtype="float32",
    )


def lose_one_of_three(
    cluster: ServingCluster, lost: int, num_tokens: int, kill: Callable[[str], None]
) -> None:
    """Both survivors' streams continue as undisturbed, with either leader."""
    ranks = [rank for rank in range(3) if rank != lost]
    streams = {rank: cluster.stream(rank) for rank in ranks}
    asked = {r: requests(num_tokens, f"calm-{r}")[r::3] for r in ranks}
    undisturbed = {r: streams[r].finish(asked[r]) for r in ranks}
    disturbed = {r: requests(num_tokens, f"hit-{r}")[r::3] for r in ranks}
    other = cluster.stream(lost)
    other.send(Request(request_id="gone", prompt=(5, 6), params=SamplingParams(max_tokens=900)))
    for rank in ranks:
        for request in disturbed[rank]:
            streams[rank].send(request)
    for rank in ranks:
        wait_for_tokens(streams[rank], len(disturbed[rank]) * num_tokens // 4)
    kill(f"colocated-{lost}")
    for rank in ranks:
        results = streams[rank].collect(disturbed[rank])
        for calm, hit in zip(undisturbed[rank].values(), results.values(), strict=True):
            assert hit.tokens == calm.tokens
            assert hit.reasons == [FinishReason.LENGTH]
            assert len(hit.tokens[0]) == num_tokens
    snapshot = cluster.wait(lambda s: s["generation"] >= 3 and s["state"] == "SERVING")
    assert snapshot["experts_complete"]
    loss, gain = snapshot["history"][1:]
    assert "go on with 2 colocated workers" in loss["effect"]
    assert "go on with 3 colocated workers" in gain["effect"]
    assert cluster.blocks_in_use() == 0
    for stream in (*streams.values(), other):
        stream.close()


@pytest.mark.parametrize(
    "lost",
    [pytest.param(0, id="leader"), pytest.param(1, id="other", marks=pytest.mark.slow)],
)
def test_losing_a_colocated_worker_with_copies_changes_no_other_stream(lost: int) -> None:
    cluster = ThreadCluster(three_colocated_workers())
    with serving(cluster):
        lose_one_of_three(cluster, lost, 48, lambda name: cluster.group.runtimes[name].stop())


@pytest.mark.ray
@pytest.mark.slow
def test_killing_a_colocated_worker_with_copies_changes_no_other_stream(local_ray: None) -> None:
    with serving(RayCluster(three_colocated_workers())) as cluster:
        lose_one_of_three(
            cluster, 0, 64, lambda name: os.kill(cluster.worker(name)["pid"], signal.SIGKILL)
        )
