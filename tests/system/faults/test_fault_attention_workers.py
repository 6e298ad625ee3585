"""Attention workers are killed while streams are under way: their requests go on elsewhere."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.harness.fault_rows import FORMS, FULL, SMALL, Form, kill, play, row_config
from tests.harness.serving_cluster import RayCluster, connected_ray, serving


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    with connected_ray():
        yield


def lose_an_attention_worker(form: Form, rank: int, transport: str = "sockets") -> None:
    """Two attention and two expert workers; the one that leads, or the other one, is killed."""
    config = row_config(2, 2, transport=transport)
    with serving(RayCluster(config)) as cluster:
        name = f"attention-{rank}"
        played = play(cluster, form, random.Random(rank), lambda: kill(cluster, name))
        assert played.num_resubmitted > 0
        snapshot = cluster.snapshot()
        assert cluster.worker(name)["state"] == "LOST"
        assert snapshot["experts_complete"]
        assert any(f"lost {name}" in entry["cause"] for entry in snapshot["history"])


@pytest.mark.ray
@pytest.mark.parametrize("form", FORMS)
def test_killing_the_attention_worker_that_leads(form: Form) -> None:
    lose_an_attention_worker(form, 0)


@pytest.mark.ray
@pytest.mark.slow
def test_killing_the_other_attention_worker() -> None:
    lose_an_attention_worker(FULL, 1)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_killing_an_attention_worker_over_collectives(rank: int) -> None:
    lose_an_attention_worker(SMALL, rank, "collective")
