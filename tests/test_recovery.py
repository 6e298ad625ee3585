"""The recovery path, proved once: an expert worker dies and no stream notices."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.config import ClusterConfig
from cluster.model_source import bundled_checkpoint
from tests.engine_stream import EngineStream
from tests.serving_cluster import RayCluster, connected_ray, make_config, serving
from workers.request import FinishReason, Request, SamplingParams

pytestmark = pytest.mark.ray

NUM_STREAMS = 8


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with connected_ray():
        yield


def three_expert_workers() -> ClusterConfig:
    """22 spare slots a bank: every one of the 64 experts has a copy on another worker."""
    return make_config(
        bundled_checkpoint(), 1, 3, workers={"num_redundant_experts": 22}, dtype="float32"
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
    """Until so many outputs came; they are put back for the collector."""
    seen = [stream.next() for _ in range(count)]
    stream.put_back(seen)


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
        snapshot = cluster.wait(lambda s: s["generation"] == 2)
        assert snapshot["state"] == "DEGRADED"
        assert snapshot["experts_complete"]
        assert cluster.worker("expert-1")["state"] == "LOST"
        assert "expert-1" in snapshot["history"][-1]["cause"]
        for calm, hit in zip(undisturbed.values(), results.values(), strict=True):
            assert hit.tokens == calm.tokens
            assert hit.reasons == [FinishReason.LENGTH]
            assert len(hit.tokens[0]) == num_tokens
        assert cluster.blocks_in_use() == 0
        stream.close()
