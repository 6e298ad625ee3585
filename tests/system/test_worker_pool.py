"""Processes that serve one cluster after the other, as ``tests/long/parity.py`` uses them."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from benchmarks.harness.serving_cluster import ThreadCluster, serving
from tests.harness.golden_clusters import check_greedy, float32_config
from tests.harness.worker_pool import PooledWorkerGroup
from tests.reference.goldens import Golden


@pytest.mark.slow
def test_processes_serve_one_model_after_the_other(golden: Callable[[str], Golden]) -> None:
    group = PooledWorkerGroup()
    seen = []
    try:
        for variant in ("olmoe-rope-linear", "jetmoe-top1-linear"):
            config = float32_config(golden(variant), 1, 2)
            with serving(ThreadCluster(config, group)) as cluster:
                check_greedy(cluster, golden(variant))
                seen.append({worker["pid"] for worker in cluster.snapshot()["workers"]})
    finally:
        group.close()
    assert seen[0] == seen[1]
    assert len(seen[0]) == 3
    assert os.getpid() not in seen[0]
