"""Each family loses workers of both kinds and is scaled while it serves: no client notices.

The bundled model, which the other files kill workers of, is an OLMoE.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.checkpoints.random_checkpoint import TINY, write
from benchmarks.faults.layouts import row_config
from benchmarks.harness.serving_cluster import RayCluster, ServingCluster, connected_ray, serving
from tests.harness.fault_rows import (
    SMALL,
    entries_since,
    kill_any,
    play,
    play_until,
    was_retried,
    whole,
    with_model,
)
from workers.model.families.registry import FAMILIES

OTHERS = sorted(FAMILIES.keys() - {"olmoe"})
pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module", params=OTHERS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of a family, with the bundled tokenizer."""
    family = str(request.param)
    return write(replace(TINY, family=family), tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def cluster(model: Path) -> Iterator[ServingCluster]:
    """With copies of some experts."""
    config = with_model(row_config(2, 2, num_redundant=3), model)
    with connected_ray(), serving(RayCluster(config)) as made:
        yield made


def test_an_expert_worker(cluster: ServingCluster, model: Path) -> None:
    before, draw = cluster.snapshot(), random.Random(1)
    play_until(cluster, SMALL, draw, lambda: kill_any(cluster, "expert", draw), was_retried, model)
    assert entries_since(before, whole(cluster))


def test_an_attention_worker(cluster: ServingCluster, model: Path) -> None:
    draw = random.Random(2)

    def fault() -> None:
        kill_any(cluster, "attention", draw)

    play_until(cluster, SMALL, draw, fault, lambda p: p.num_resubmitted > 0, model)
    whole(cluster)


def test_more_expert_workers_and_fewer(cluster: ServingCluster, model: Path) -> None:
    """Experts move while streams go on."""
    before = whole(cluster)["placement_epoch"]
    for count in (3, 2):
        order = cluster.call("begin", "scale", {"expert": count, "limit_s": 120.0})
        while cluster.call("operation", order["id"])["state"] == "RUNNING":
            play(cluster, SMALL, random.Random(count), lambda: None, model)
        assert cluster.call("operation", order["id"])["state"] == "SUCCEEDED"
        epoch = cluster.wait(lambda s: s["state"] == "SERVING")["placement_epoch"]
        assert epoch > before
        before = epoch
