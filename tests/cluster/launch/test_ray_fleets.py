"""What the actor of the table plans for an order, and what it refuses. Starts: tests/served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from cluster.actors import ray_tools
from cluster.config.cluster import ClusterConfig
from cluster.config.resources import NodeResources
from cluster.core.codec import to_plain
from cluster.core.errors import CheckpointError, ConfigError, ConflictError
from cluster.launch import ray_fleets
from cluster.launch.checkpoint_check import CheckpointCheck, CheckpointFacts
from cluster.launch.model_plan import ModelPlan, make_model_plan
from cluster.launch.ray_fleets import LoadOrder, RayFleets, as_plan, renamed
from tests.fakes import TINY_CONFIG, tiny_tensors, write_tiny_checkpoint

TOKEN, FLEET = "token of the first", "model-3"
FLEETS = RayFleets({}, 1.0)


@pytest.fixture(autouse=True)
def ray_of_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the CPUs of its node are free."""
    node = NodeResources(node_id="n", address="10.0.0.1", cpus=16.0)
    monkeypatch.setattr(ray_tools, "cluster_nodes", lambda: (node,))
    monkeypatch.setattr(ray_tools, "free_resources", lambda: {"CPU": 8.0, "GPU": 0.0})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_tiny_checkpoint(path, tensors=tiny_tensors(TINY_CONFIG, seed=0))
    return path


@pytest.fixture(scope="module")
def facts(folder: Path) -> CheckpointFacts:
    """Found once, as each check is a process of its own."""
    found: CheckpointFacts = CheckpointCheck(folder, {}, False).result()
    return found


@pytest.fixture
def first(folder: Path, facts: CheckpointFacts, monkeypatch: pytest.MonkeyPatch) -> ModelPlan:
    """The plan of a model that serves; all further checkpoints are the same."""
    monkeypatch.setattr(ray_fleets, "_check_checkpoint", lambda config: facts)
    return first_plan(folder, facts)


def first_plan(folder: Path, facts: CheckpointFacts, **sections: dict[str, Any]) -> ModelPlan:
    data = ClusterConfig.from_dict(
        {"model": {"path": str(folder), "served_model_name": "m"}, "cluster_token": TOKEN}
    ).to_dict()
    for name, fields in sections.items():
        data[name] |= fields
    config = ClusterConfig.from_dict(data)
    return make_model_plan(config, facts)


def changed(first: ModelPlan, **sections: dict[str, Any]) -> ModelPlan:
    """The plan with some options."""
    return first_plan(Path(first.config.model.path), first.facts, **sections)


def planned(
    first: ModelPlan,
    *others: ModelPlan,
    base: ModelPlan | None = None,
    model: str = "m",
    **fields: Any,
) -> ModelPlan:
    """The plan of an order beside ``others``."""
    order = LoadOrder(model=model, **{"settings": {}, **fields})
    return as_plan(FLEETS.plan(order, first, base, others, FLEET))


def test_a_revision_keeps_what_its_order_does_not_change(first: ModelPlan) -> None:
    first = changed(first, engine={"max_num_seqs": 7}, gateway={"max_queue": 9})
    made = planned(first, first, base=first, settings={"num-expert-workers": 3}).config
    assert (made.engine.max_num_seqs, made.gateway.max_queue) == (7, 9)
    assert (made.workers.num_expert_workers, made.model.path) == (3, first.config.model.path)
    assert made.fleet == FLEET
    assert made.cluster_token not in ("", TOKEN)
    assert dict(made.workers.other_pools) == first.config.workers.pools


def test_a_new_model_has_defaults_and_the_options_of_the_gateway(first: ModelPlan) -> None:
    first = changed(first, engine={"max_num_seqs": 7}, gateway={"max_queue": 9})
    made = planned(first, first, model="n", path=first.config.model.path).config
    assert made.model.served_model_name == "n"
    assert (made.engine.max_num_seqs == 7, made.gateway.max_queue) == (False, 9)


def test_folders_of_a_fleet_are_its_own(first: ModelPlan, tmp_path: Path) -> None:
    kv, traces = tmp_path / "kv", tmp_path / "traces"
    first = changed(
        first,
        kv_tiers={"kv_disk_dir": str(kv), "kv_disk_bytes": 1 << 30, "kv_host_bytes": 1 << 30},
        observability={"trace_dir": str(traces)},
    )
    second = planned(first, first, base=first)
    third = planned(first, second, base=second)
    for made in (second, third):
        assert made.config.kv_tiers.kv_disk_dir == str(kv / FLEET)
        assert made.config.observability.trace_dir == str(traces / FLEET)


@pytest.mark.parametrize(
    ("settings", "param", "words"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs", "at least"),
        ({"port": 1}, "port", "holds for all models"),
        ({"log_format": "json"}, "log_format", "holds for all models"),
        ({"served-model-name": "x"}, "served-model-name", "give it as model"),
        ({"no-such": 1}, "no-such", "is not an option of serve"),
        ({"cluster_token": "x"}, "cluster_token", "is not an option of serve"),
    ],
)
def test_options_are_refused_by_name(
    first: ModelPlan, settings: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        planned(first, base=first, settings=settings)
    assert caught.value.field == param


def test_checkpoints_are_refused_by_name(
    first: ModelPlan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="is required: n is not served yet"):
        planned(first, model="n")
    other = replace(first, facts=replace(first.facts, model_type="another"))
    with pytest.raises(ConfigError, match="not another") as caught:
        planned(first, base=other, path=first.config.model.path)
    assert caught.value.field == "path"
    monkeypatch.undo()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises((CheckpointError, ConfigError)):
        planned(first, base=first, path=str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "gpus", "words"),
    [
        ({"cpus_per_worker": 4.0}, 0.0, "12 CPUs are needed and 8 free"),
        ({"device": "cuda"}, 4.0, "3 GPUs are needed and 0 free"),
    ],
)
def test_without_room_a_fleet_takes_the_place_of_another(
    first: ModelPlan,
    settings: dict[str, Any],
    gpus: float,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node = NodeResources(node_id="n", address="10.0.0.1", cpus=16.0, gpus=gpus)
    monkeypatch.setattr(ray_tools, "cluster_nodes", lambda: (node,))
    rule = f"{words}: there is no room for a second set of workers: load it in place"
    with pytest.raises(ConflictError, match=rule):
        planned(first, base=first, settings=settings)
    made = planned(first, base=first, settings=settings, in_place=True)
    assert made.config.fleet == FLEET


def test_weights_that_do_not_fit_in_memory_are_refused(
    first: ModelPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(ConflictError, match="and 1000 bytes of memory are free"):
        planned(first, first, base=first)


def test_a_revision_that_returns_has_another_fleet_and_token(first: ModelPlan) -> None:
    first = changed(first, workers={"cpus_per_worker": 1.0})
    again = as_plan(renamed(dict(to_plain(first)), FLEET))
    assert again.config.fleet == FLEET
    assert again.config.cluster_token not in ("", TOKEN)
    assert again.config.workers.reserves_cpus
    kept = replace(again.config, fleet="", cluster_token=TOKEN, workers=first.config.workers)
    assert (kept, again.facts) == (first.config, first.facts)
