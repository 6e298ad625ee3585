"""Expert workers that hold the only copies are killed: survivors load them, and no client notices.

One cluster of real actors plays all rows, as in ``test_faults_with_copies``.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults.layouts import row_config
from benchmarks.harness.serving_cluster import RayCluster, ServingCluster, connected_ray, serving
from cluster.launch.model_source import bundled_checkpoint
from tests.harness.fault_rows import (
    FORMS,
    Form,
    entries_since,
    kill,
    kill_any,
    play,
    play_until,
    was_retried,
    whole,
)

pytestmark = [pytest.mark.ray, pytest.mark.parametrize("form", FORMS)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that may go away."""
    return shutil.copytree(bundled_checkpoint(), tmp_path_factory.mktemp("copy") / "checkpoint")


@pytest.fixture(scope="module")
def shared(checkpoint: Path) -> Iterator[ServingCluster]:
    config = row_config(1, 4)
    config = replace(config, model=replace(config.model, path=str(checkpoint)))
    with connected_ray(), serving(RayCluster(config)) as made:
        yield made


@pytest.fixture
def cluster(shared: ServingCluster) -> ServingCluster:
    """Whole."""
    whole(shared)
    return shared


def test_a_worker_with_the_only_copies(cluster: ServingCluster, form: Form) -> None:
    before, draw = cluster.snapshot(), random.Random(2)
    play_until(cluster, form, draw, lambda: kill_any(cluster, "expert", draw), was_retried)
    history = entries_since(before, whole(cluster))
    assert " loads " in history[0]["effect"] or " load " in history[0]["effect"]


@pytest.mark.slow
def test_two_workers_at_once(cluster: ServingCluster, form: Form) -> None:
    draw = random.Random(5)
    play_until(cluster, form, draw, lambda: kill_any(cluster, "expert", draw, 2), was_retried)
    whole(cluster)


@pytest.mark.slow
def test_a_worker_during_a_generation_change(cluster: ServingCluster, form: Form) -> None:
    draw = random.Random(7)
    play_until(cluster, form, draw, lambda: one_after_the_other(cluster, draw), was_retried)
    whole(cluster)


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


def test_the_checkpoint_is_gone(cluster: ServingCluster, form: Form, checkpoint: Path) -> None:
    """Serving goes on; a reload says what it lacks, and happens once the files are back."""
    before, draw = cluster.snapshot(), random.Random(6)
    away = checkpoint.with_name("away")

    def fault() -> None:
        checkpoint.rename(away)
        try:
            kill_any(cluster, "expert", draw)
            snapshot = cluster.wait(nobody_can_load)
        finally:
            away.rename(checkpoint)
        problem = next(p for p in snapshot["problems"] if "cannot load" in p)
        assert "model.safetensors" in problem
        assert str(checkpoint) not in problem
        assert snapshot["state"] != "SERVING"

    play(cluster, form, draw, fault)
    history = entries_since(before, whole(cluster))
    assert any("model.safetensors" in entry["cause"] for entry in history)


def nobody_can_load(snapshot: dict[str, Any]) -> bool:
    """One survivor after the other has failed; before the last one, the others still try."""
    has_failed = any("cannot load" in problem for problem in snapshot["problems"])
    return has_failed and not snapshot["experts_complete"]
