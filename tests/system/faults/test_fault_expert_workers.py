"""Workers with experts are killed while streams are under way: no client notices, others take over.

One cluster of real actors for each layout plays several rows, each from a whole cluster on: so
every row also shows that the one before was made good.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.config.cluster import ClusterConfig
from cluster.launch.model_source import bundled_checkpoint
from tests.harness.fault_rows import (
    FORMS,
    FULL,
    SMALL,
    Form,
    check_replaced,
    kill,
    kill_any,
    kill_in_a_step,
    play,
    play_until_retried,
    row_config,
)
from tests.harness.serving_cluster import RayCluster, ServingCluster, connected_ray, serving

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    with connected_ray():
        yield


def lose_one(config: ClusterConfig, form: Form, draw: random.Random) -> list[dict[str, Any]]:
    """Kill a worker with experts, and wait until the cluster is whole; its history."""
    role = "colocated" if config.workers.mode == "colocated" else "expert"
    with serving(RayCluster(config)) as cluster:
        play_until_retried(cluster, form, draw, lambda: kill_any(cluster, role, draw))
        history: list[dict[str, Any]] = check_replaced(cluster)["history"]
        return history


@pytest.mark.parametrize("form", FORMS)
def test_a_worker_whose_experts_have_copies_elsewhere(form: Form) -> None:
    history = lose_one(row_config(1, 3, num_redundant=22), form, random.Random(1))
    assert history[1]["effect"].startswith("go on with 1 attention and 2 expert workers")
    assert "is ready" in history[-1]["cause"]


@pytest.mark.parametrize("form", FORMS)
def test_a_worker_with_the_only_copies(form: Form) -> None:
    history = lose_one(row_config(1, 2), form, random.Random(2))
    assert " loads " in history[1]["effect"]
    assert all(entry["took_s"] is not None for entry in history)


@pytest.mark.slow
@pytest.mark.parametrize("num_redundant", [0, 22])
def test_a_colocated_worker(num_redundant: int) -> None:
    lose_one(
        row_config(0, 3, mode="colocated", num_redundant=num_redundant), FULL, random.Random(3)
    )


@pytest.mark.slow
@pytest.mark.parametrize(("num_experts", "num_redundant"), [(2, 0), (3, 22)])
def test_over_collectives(num_experts: int, num_redundant: int) -> None:
    config = row_config(1, num_experts, num_redundant=num_redundant, transport="collective")
    lose_one(config, SMALL, random.Random(4))


@pytest.mark.parametrize("form", FORMS)
def test_two_workers_at_once_and_one_during_a_generation_change(form: Form) -> None:
    with serving(RayCluster(row_config(1, 4))) as cluster:
        draw = random.Random(5)
        play_until_retried(cluster, form, draw, lambda: kill_any(cluster, "expert", draw, 2))
        check_replaced(cluster)
        play_until_retried(cluster, form, draw, lambda: one_after_the_other(cluster, draw))
        check_replaced(cluster)


def one_after_the_other(cluster: ServingCluster, draw: random.Random) -> None:
    """Kill a worker, and another one as soon as the controller has noticed."""
    before = cluster.snapshot()
    serving_now = [
        w["name"] for w in before["workers"] if w["role"] == "expert" and w["state"] == "SERVING"
    ]
    first, second = draw.sample(sorted(serving_now), 2)
    kill(cluster, first)
    cluster.wait(lambda s: s["generation"] > before["generation"])
    kill(cluster, second)


@pytest.mark.parametrize("form", FORMS)
def test_the_checkpoint_is_gone(form: Form, tmp_path: Path) -> None:
    """Serving goes on; a reload says what it lacks, and happens once the files are back."""
    here, away = tmp_path / "checkpoint", tmp_path / "away"
    shutil.copytree(bundled_checkpoint(), here)
    config = row_config(1, 2)
    config = replace(config, model=replace(config.model, path=str(here)))
    draw = random.Random(6)
    with serving(RayCluster(config)) as cluster:

        def fault() -> None:
            here.rename(away)
            kill_any(cluster, "expert", draw)
            snapshot = cluster.wait(lambda s: any("cannot load" in p for p in s["problems"]))
            assert "model.safetensors" in snapshot["problems"][0]
            assert str(here) not in snapshot["problems"][0]
            assert snapshot["state"] != "SERVING"
            assert not snapshot["experts_complete"]
            away.rename(here)

        play(cluster, form, draw, fault)
        history = check_replaced(cluster)["history"]
        assert any("model.safetensors" in entry["cause"] for entry in history)


@pytest.mark.slow
def test_copies_serve_on_without_the_checkpoint(tmp_path: Path) -> None:
    """No weight is read for that; a worker for the empty place says what it lacks."""
    here = tmp_path / "checkpoint"
    shutil.copytree(bundled_checkpoint(), here)
    config = row_config(1, 3, num_redundant=22, detection_limit_s=10.0)  # killed, not lost before
    config = replace(config, model=replace(config.model, path=str(here)))
    with serving(RayCluster(config)) as cluster:

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
