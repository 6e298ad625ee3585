"""A served cluster grows while requests wait, and shrinks when they are over."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from benchmarks.faults.layouts import row_config
from benchmarks.harness.cluster_gateway import gateway_of
from benchmarks.harness.mixed_calls import make_calls
from benchmarks.harness.serving_cluster import (
    RayCluster,
    ServingCluster,
    ThreadCluster,
    connected_ray,
    serving,
)
from benchmarks.harness.stalls import Limit
from cluster.config.autoscale import AutoscaleSection
from cluster.config.cluster import ClusterConfig
from tests.harness.fault_rows import SMALL, check_answers, undisturbed, wait_operation

GROWS_S = 40.0
"""Limit for a queue to be seen and a worker to start."""


def autoscaled(**more: Any) -> ClusterConfig:
    """A cluster that runs one sequence at a time, and may get a second attention worker.

    With a target of all its seats, no use alone makes it grow: only what waits does.
    """
    config = row_config(1, 2, engine={"max_num_seqs": 1})
    section = AutoscaleSection(
        autoscale="on", max_attention_workers=2, kv_target=1.0, queue_s=2.0, sample_s=0.25, **more
    )
    return dataclasses.replace(config, autoscale=section)


def num_attention(snapshot: dict[str, Any]) -> int:
    """Attention workers that serve."""
    states = [(w["role"], w["state"]) for w in snapshot["workers"]]
    return states.count(("attention", "SERVING"))


def grow(cluster: ServingCluster) -> None:
    """Ask again and again until a second worker serves; every answer is right."""
    expected, calls = undisturbed(SMALL), make_calls(SMALL.num_streams, SMALL.num_tokens)
    limit, rounds = Limit(GROWS_S), 0
    with gateway_of(cluster) as gateway:
        while num_attention(cluster.snapshot()) < 2:
            assert not limit.is_over(), cluster.snapshot(fresh=True)["autoscale"]
            check_answers(gateway.stream(calls, f"round-{rounds}").finish(), expected)
            rounds += 1
        check_answers(gateway.stream(calls, "after").finish(), expected)


def test_a_pool_grows_with_its_queue_and_shrinks_without() -> None:
    with serving(ThreadCluster(autoscaled(up_s=0.5, down_s=1.5))) as cluster:
        grow(cluster)
        snapshot = cluster.wait(lambda s: num_attention(s) == 1 and s["state"] == "SERVING")
        causes = [e["cause"] for e in snapshot["history"] if e["cause"].startswith("autoscaling")]
        assert "sequences wait at each worker, above 1" in causes[0]
        assert "nothing waited" in causes[1]
        assert len(causes) == 2
        operations = cluster.call("operations")
        ends = [wait_operation(cluster, o["id"])["state"] for o in operations]
        assert ends == ["SUCCEEDED", "SUCCEEDED"]


@pytest.mark.ray
@pytest.mark.slow
def test_actors_start_where_requests_wait() -> None:
    with connected_ray(), serving(RayCluster(autoscaled())) as cluster:
        grow(cluster)
        (operation,) = cluster.call("operations")
        assert wait_operation(cluster, operation["id"])["state"] == "SUCCEEDED"
        assert operation["target"] == "2 attention and 2 expert workers"
