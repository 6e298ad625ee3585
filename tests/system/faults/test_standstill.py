"""Readiness of a gateway while an expert worker stands still, which is not lost by that."""

from __future__ import annotations

import pytest

from benchmarks.harness.cluster_gateway import gateway_of
from benchmarks.harness.mixed_calls import make_calls
from benchmarks.harness.serving_cluster import RayCluster, connected_ray, make_config, serving
from benchmarks.harness.stalls import wait_until
from tests.harness.fault_rows import stopped
from tests.paths import DEMO

pytestmark = pytest.mark.ray


def test_readiness_falls_by_rank_and_rises_when_steps_commit_again() -> None:
    config = make_config(DEMO, 1, 2, transport={"detection_limit_s": 60.0})
    with connected_ray(), serving(RayCluster(config)) as cluster, gateway_of(cluster) as gateway:
        streams = gateway.stream(make_calls(2, 100))
        reason = ["steps wait for expert rank 1 (expert-1)"]
        with stopped(cluster.worker("expert-1")["pid"]):
            wait_until(
                lambda: gateway.core.readiness.not_ready_reasons() == reason, "readiness to fall"
            )
            assert cluster.snapshot()["problems"] == ["steps wait for expert-1"]
        wait_until(lambda: not gateway.core.readiness.not_ready_reasons(), "readiness to rise")
        assert all(answer.num_tokens >= 100 for answer in streams.finish())
        assert cluster.snapshot()["generation"] == 1
