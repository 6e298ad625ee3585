"""Workers die in colocated clusters and over collectives, and no client notices."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults.layouts import row_config
from benchmarks.harness.serving_cluster import RayCluster, ThreadCluster, connected_ray, serving
from cluster.launch.model_source import bundled_checkpoint
from tests.harness.fault_rows import (
    FORMS,
    FULL,
    SMALL,
    Form,
    check_gone,
    entries_since,
    kill,
    kill_any,
    kill_in_a_step,
    play,
    play_until,
    quiet_config,
    serving_name,
    stop_until_lost,
    was_retried,
    whole,
)


@pytest.mark.slow
def test_a_colocated_worker_of_threads_that_leads() -> None:
    cluster = ThreadCluster(quiet_config(0, 3, mode="colocated", num_redundant=22))
    with serving(cluster):
        played = play(cluster, SMALL, random.Random(0), cluster.group.workers["colocated-0"].stop)
        assert played.num_resubmitted > 0
        loss, *_, gain = entries_since({"generation": 1}, whole(cluster))
        assert "continue with 2 colocated workers" in loss["effect"]
        assert "continue with 3 colocated workers" in gain["effect"]


def test_the_one_worker_of_threads() -> None:
    """Its successor brings all experts with it."""
    cluster = ThreadCluster(quiet_config(1, 1, mode="local"))
    with serving(cluster):
        played = play(cluster, SMALL, random.Random(0), cluster.group.workers["attention-0"].stop)
        assert played.num_resubmitted > 0
        whole(cluster)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("form", FORMS)
def test_the_one_worker(form: Form) -> None:
    draw = random.Random(5)
    with connected_ray(), serving(RayCluster(row_config(1, 1, mode="local"))) as cluster:

        def fault() -> None:
            kill_any(cluster, "attention", draw)

        play_until(cluster, form, draw, fault, lambda played: played.num_resubmitted > 0)
        whole(cluster)


LAYOUTS: dict[str, tuple[tuple[int, int], dict[str, Any], Form]] = {
    "colocated": ((0, 3), {"mode": "colocated"}, FULL),
    "colocated-copies": ((0, 3), {"mode": "colocated", "num_redundant": 22}, FULL),
    "collective": ((1, 2), {"transport": "collective"}, SMALL),
    "collective-copies": ((1, 3), {"transport": "collective", "num_redundant": 22}, SMALL),
}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_worker_with_experts(layout: str) -> None:
    pools, options, form = LAYOUTS[layout]
    role, draw = "expert" if pools[0] else "colocated", random.Random(3)
    with connected_ray(), serving(RayCluster(row_config(*pools, **options))) as cluster:
        play_until(cluster, form, draw, lambda: kill_any(cluster, role, draw), was_retried)
        whole(cluster)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_attention_worker_over_collectives(rank: int) -> None:
    with connected_ray(), serving(RayCluster(row_config(2, 2, transport="collective"))) as cluster:

        def fault() -> None:
            kill(cluster, serving_name(cluster, "attention", rank))

        play_until(cluster, SMALL, random.Random(rank), fault, lambda p: p.num_resubmitted > 0)
        whole(cluster)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_colocated_worker_that_wakes_up_late(form: Form) -> None:
    config = row_config(0, 3, mode="colocated", num_redundant=128)
    with connected_ray(), serving(RayCluster(config)) as cluster:
        pid = cluster.worker("colocated-1")["pid"]
        play(cluster, form, random.Random(1), lambda: stop_until_lost(cluster, "colocated-1"))
        whole(cluster)
        check_gone(pid)


@pytest.mark.ray
@pytest.mark.slow
def test_copies_serve_on_without_the_checkpoint(tmp_path: Path) -> None:
    """No weight is read for that; a worker for the empty place says what it lacks."""
    here = tmp_path / "checkpoint"
    shutil.copytree(bundled_checkpoint(), here)
    config = row_config(1, 3, num_redundant=22, detection_limit_s=10.0)  # killed, not lost before
    config = replace(config, model=replace(config.model, path=str(here)))
    with connected_ray(), serving(RayCluster(config)) as cluster:

        def fault() -> None:
            here.rename(tmp_path / "away")
            kill_in_a_step(cluster, "expert-1")

        played = play(cluster, FULL, random.Random(7), fault)
        assert played.num_retried > 0
        snapshot = cluster.wait(lambda s: any("left out" in p for p in s["problems"]))
        assert snapshot["state"] == "DEGRADED"
        assert snapshot["experts_complete"]
        (problem,) = snapshot["problems"]
        assert problem.startswith("expert-1 is left out: died 3 times while starting")
        assert "checkpoint: no such folder" in problem
        assert str(here) not in problem
        loads = [entry for entry in snapshot["history"] if " loads " in entry["effect"]]
        assert loads == []
