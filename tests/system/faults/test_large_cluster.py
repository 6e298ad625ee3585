"""More than nine workers: headers reach some of them through others, which die under load."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

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
from tests.harness.fault_rows import (
    SMALL,
    check_answers,
    kill,
    play_until,
    quiet_config,
    serving_name,
    undisturbed,
    wait_operation,
    was_disturbed,
    whole,
)
from tests.system.faults.test_scaling import go_through, serving_roles
from workers.engine.step_tree import StepTree

INNER = 1
"""Attention rank that sends headers on to others."""


def kill_all(cluster: ServingCluster, *places: tuple[str, int]) -> None:
    """Kill the workers that serve at these places, one right after the other."""
    for name in [serving_name(cluster, role, rank) for role, rank in places]:
        kill(cluster, name)


def test_ten_workers_give_the_answers_of_two() -> None:
    calls = make_calls(SMALL.num_streams, SMALL.num_tokens)
    with serving(ThreadCluster(quiet_config(6, 4))) as cluster, gateway_of(cluster) as gateway:
        assert isinstance(cluster, ThreadCluster)
        generation = cluster.group.workers["attention-0"].membership.generation
        assert StepTree.of(generation, f"attention-{INNER}").children
        check_answers(gateway.stream(calls, "large").finish(), undisturbed(SMALL))


@pytest.mark.ray
@pytest.mark.slow
def test_sixteen_workers_lose_three_at_once_scale_and_rebalance() -> None:
    with connected_ray(), serving(RayCluster(row_config(8, 8, num_redundant=2))) as cluster:

        def fault() -> None:
            kill_all(cluster, ("attention", INNER), ("attention", 7), ("expert", 3))

        play_until(cluster, SMALL, random.Random(1), fault, was_disturbed)
        whole(cluster)
        go_through(cluster, SMALL, [{"attention": 10, "expert": 12}, {"attention": 8, "expert": 8}])
        assert serving_roles(cluster) == ["attention"] * 8 + ["expert"] * 8
        expected, calls = undisturbed(SMALL), make_calls(SMALL.num_streams, SMALL.num_tokens)
        with ThreadPoolExecutor(1) as pool, gateway_of(cluster) as gateway:
            streams = gateway.stream(calls, "rebalanced")
            streams.wait_tokens(SMALL.num_streams)
            begun = cluster.call("begin", "rebalance", {})
            done = pool.submit(wait_operation, cluster, begun["id"])
            check_answers(streams.finish(), expected)
            assert done.result()["state"] == "SUCCEEDED"
