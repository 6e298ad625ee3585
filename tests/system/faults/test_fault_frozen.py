"""A worker that holds requests freezes, is declared lost, and wakes up later."""

from __future__ import annotations

import random
from collections.abc import Iterator

import psutil
import pytest

from tests.harness.fault_rows import FORMS, Form, play, row_config, stop_until_lost
from tests.harness.serving_cluster import RayCluster, connected_ray, serving

pytestmark = pytest.mark.ray

LIMIT_S = 60.0


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    with connected_ray():
        yield


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("disaggregated", "attention-0"),
        pytest.param("colocated", "colocated-1", marks=pytest.mark.slow),
    ],
)
def test_a_worker_with_requests_that_wakes_up_late_disturbs_nobody(
    mode: str, name: str, form: Form
) -> None:
    num_experts = 2 if mode == "disaggregated" else 3
    config = row_config(2, num_experts, mode=mode, num_redundant=64 * (num_experts - 1))
    with serving(RayCluster(config)) as cluster:
        process = psutil.Process(cluster.worker(name)["pid"])
        play(cluster, form, random.Random(1), lambda: stop_until_lost(cluster, name))
        snapshot = cluster.wait(lambda s: s["state"] in ("SERVING", "DEGRADED"))
        assert snapshot["generation"] > 1
        # Whichever of the two rules of silence comes first: see cluster/policy/failure.py.
        reason = cluster.worker(name)["reason"]
        assert "no heartbeat" in reason or "has stalled" in reason
        psutil.wait_procs([process], LIMIT_S)
        assert not process.is_running()
