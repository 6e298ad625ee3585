"""Workers of each kind die amid streams with drafts: answers are those of a server without."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.checkpoints.random_checkpoint import TINY, write
from benchmarks.faults.layouts import row_config
from benchmarks.harness.serving_cluster import (
    RayCluster,
    ServingCluster,
    ThreadCluster,
    connected_ray,
    serving,
)
from cluster.config.cluster import ClusterConfig
from cluster.config.speculation import SpeculationSection
from tests.harness.fault_rows import (
    FORMS,
    FULL,
    SMALL,
    Form,
    Played,
    entries_since,
    kill_any,
    play,
    play_until,
    quiet_config,
    was_retried,
    whole,
    with_model,
)
from tests.harness.tiers import quick_rows
from workers.speculation.acceptance import Acceptance

NGRAM = SpeculationSection(
    speculative_method="ngram", num_speculative_tokens=5, ngram_min=1, ngram_max=4
)


MTP = SpeculationSection(speculative_method="mtp")


def with_drafts(config: ClusterConfig) -> ClusterConfig:
    return replace(config, speculation=NGRAM)


@pytest.fixture(scope="module")
def predicting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a predictor."""
    sizes = replace(TINY, family="glm4_moe", prediction_layers=1)
    return write(sizes, tmp_path_factory.mktemp("predicting"))


def with_predictions(config: ClusterConfig, model: Path) -> ClusterConfig:
    return replace(with_model(config, model), speculation=MTP)


def num_drafted(cluster: ServingCluster) -> float:
    """Tokens of drafts that living workers have run."""
    name = "spec_decode_num_draft_tokens_total"
    return sum(float(w["stats"].get(name, 0)) for w in cluster.snapshot(fresh=True)["workers"])


@pytest.mark.parametrize("role", quick_rows({"attention"}, ["attention", "expert", "colocated"]))
def test_a_worker_of_threads(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every guess run, whatever it costs."""
    monkeypatch.setattr(Acceptance, "num_worthwhile", lambda self, price, most: most)
    mode = "colocated" if role == "colocated" else "disaggregated"
    config = quiet_config(2, 3, mode=mode, num_redundant=22)
    cluster = ThreadCluster(with_drafts(config))
    with serving(cluster):
        before, victim = cluster.snapshot(), cluster.group.workers[f"{role}-1"]
        play(cluster, SMALL, random.Random(2), victim.stop)
        assert num_drafted(cluster) > 0
        assert entries_since(before, whole(cluster))


@pytest.mark.parametrize("role", quick_rows({"expert"}, ["attention", "expert", "colocated"]))
def test_a_worker_of_threads_that_predicts(
    role: str, predicting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The predictor's bank is exchanged when tokens are drawn already."""
    monkeypatch.setattr(Acceptance, "num_worthwhile", lambda self, price, most: most)
    mode = "colocated" if role == "colocated" else "disaggregated"
    config = quiet_config(2, 3, mode=mode, num_redundant=2)
    cluster = ThreadCluster(with_predictions(config, predicting))
    with serving(cluster):
        before, victim = cluster.snapshot(), cluster.group.workers[f"{role}-1"]
        play(cluster, SMALL, random.Random(2), victim.stop, predicting)
        assert num_drafted(cluster) > 0
        assert entries_since(before, whole(cluster))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("form", FORMS)
def test_workers_of_both_pools(form: Form) -> None:
    draw = random.Random(1)
    with connected_ray(), serving(RayCluster(with_drafts(row_config(2, 2)))) as cluster:
        play_until(cluster, form, draw, lambda: kill_any(cluster, "expert", draw), was_retried)
        play_until(cluster, form, draw, lambda: kill_any(cluster, "attention", draw), was_moved)
        assert num_drafted(cluster) > 0
        whole(cluster)


def was_moved(played: Played) -> bool:
    """A request went on at another worker."""
    return played.num_resubmitted > 0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("role", ["attention", "expert"])
def test_a_worker_that_predicts(role: str, predicting: Path) -> None:
    config = with_predictions(row_config(2, 2), predicting)
    draw = random.Random(4)
    with connected_ray(), serving(RayCluster(config)) as cluster:

        def fault() -> None:
            kill_any(cluster, role, draw)

        is_hit = was_moved if role == "attention" else was_retried
        play_until(cluster, FULL, draw, fault, is_hit, predicting)
        whole(cluster)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("transport", ["sockets", "collective"])
def test_a_colocated_worker(transport: str) -> None:
    config = with_drafts(row_config(0, 3, mode="colocated", transport=transport))
    draw = random.Random(3)
    with connected_ray(), serving(RayCluster(config)) as cluster:
        play_until(cluster, FULL, draw, lambda: kill_any(cluster, "colocated", draw), was_retried)
        assert num_drafted(cluster) > 0
        whole(cluster)
