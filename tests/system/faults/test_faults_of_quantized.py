"""Workers of each kind die while weights are quantized: codes move, and answers stay."""

from __future__ import annotations

import random

import pytest

from benchmarks.faults.layouts import row_config
from benchmarks.harness.serving_cluster import RayCluster, ThreadCluster, connected_ray, serving
from tests.harness.fault_rows import (
    FORMS,
    SMALL,
    Form,
    entries_since,
    kill_any,
    play_until,
    quiet_config,
    serving_name,
    was_disturbed,
    was_retried,
    whole,
    with_quantized,
)
from tests.harness.tiers import quick_rows


@pytest.mark.parametrize("role", quick_rows({"expert"}, ["attention", "expert", "colocated"]))
def test_a_worker_of_threads(role: str) -> None:
    mode = "colocated" if role == "colocated" else "disaggregated"
    config = quiet_config(2, 3, mode=mode, num_redundant=22)
    cluster = ThreadCluster(with_quantized(config, "int4", "all"))
    with serving(cluster):
        before = cluster.snapshot()

        def stop_one() -> None:
            cluster.group.workers[serving_name(cluster, role, 1)].stop()

        play_until(cluster, SMALL, random.Random(2), stop_one, was_disturbed)
        assert entries_since(before, whole(cluster))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("form", FORMS)
def test_workers_of_both_pools(form: Form) -> None:
    draw = random.Random(1)
    config = with_quantized(row_config(2, 2), "int8")
    with connected_ray(), serving(RayCluster(config)) as cluster:
        play_until(cluster, form, draw, lambda: kill_any(cluster, "expert", draw), was_retried)
        play_until(
            cluster,
            form,
            draw,
            lambda: kill_any(cluster, "attention", draw),
            lambda played: played.num_resubmitted > 0,
        )
        whole(cluster)
