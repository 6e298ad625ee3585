"""Workers die while requests have adapters, and no client notices."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checkpoints.adapters import random_adapter, target_shapes
from benchmarks.faults.layouts import row_config
from benchmarks.harness.cluster_gateway import Answer, gateway_of
from benchmarks.harness.mixed_calls import make_calls
from benchmarks.harness.serving_cluster import (
    RayCluster,
    ServingCluster,
    ThreadCluster,
    connected_ray,
    serving,
)
from cluster.config.cluster import ClusterConfig
from cluster.launch.model_source import bundled_checkpoint
from gateway.core.call import GenerateCall
from tests.harness.fault_rows import (
    FORMS,
    SMALL,
    Form,
    blocks_held,
    check_answers,
    kill_any,
    num_abandoned,
    quiet_config,
    serving_name,
    whole,
)
from tests.harness.tiers import quick_rows

NAMES = (None, "sql", "chat")
_NUM_TRIES = 8


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Two adapters of the bundled model, as ``lora_modules``."""
    shapes, folder = target_shapes(bundled_checkpoint()), tmp_path_factory.mktemp("adapters")
    adapters = {"sql": random_adapter(shapes, 1), "chat": random_adapter(shapes, 2, rank=7)}
    return tuple(f"{name}={a.write(folder / name)}" for name, a in adapters.items())


def calls(form: Form) -> list[GenerateCall]:
    """Sampling in all its forms, with adapters and without."""
    made = make_calls(form.num_streams, form.num_tokens)
    return [replace(call, model=NAMES[i % 3]) for i, call in enumerate(made)]


@cache
def undisturbed(form: Form, modules: tuple[str, ...]) -> tuple[Answer, ...]:
    cluster = ThreadCluster(with_adapters(quiet_config(1, 1), modules))
    with serving(cluster), gateway_of(cluster) as gateway:
        return tuple(gateway.answer(calls(form)))


def with_adapters(config: ClusterConfig, modules: tuple[str, ...]) -> ClusterConfig:
    return replace(config, lora=replace(config.lora, lora_modules=modules))


def play(
    cluster: ServingCluster,
    form: Form,
    modules: tuple[str, ...],
    fault: Callable[[], object],
    draw: random.Random,
) -> bool:
    """A fault at a random moment of streams, which get what they get without; whether it
    disturbed anything."""
    expected, before = undisturbed(form, modules), num_abandoned(cluster)
    with gateway_of(cluster) as gateway:
        streams = gateway.stream(calls(form))
        streams.wait_tokens(draw.randrange(form.num_streams * form.num_tokens // 2))
        fault()
        check_answers(streams.finish(), expected)
        cluster.wait(lambda snapshot: blocks_held(snapshot) == 0, fresh=True)
        return gateway.num_resubmitted > 0 or num_abandoned(cluster) > before


def play_until(
    cluster: ServingCluster,
    form: Form,
    modules: tuple[str, ...],
    fault: Callable[[], object],
    restore: Callable[[], object] = lambda: None,
) -> None:
    """``play``, again when the fault fell between two steps; ``restore`` after each time."""
    draw = random.Random(1)
    for _ in range(_NUM_TRIES):
        whole(cluster)
        is_hit = play(cluster, form, modules, fault, draw)
        restore()
        if is_hit:
            break
    else:
        raise AssertionError("the fault disturbed nothing")
    assert {a["name"]: a["state"] for a in whole(cluster)["adapters"]} == {
        "sql": "READY",
        "chat": "READY",
    }


@pytest.mark.parametrize("role", quick_rows({"attention"}, ["attention", "expert"]))
def test_a_worker_of_threads(role: str, modules: tuple[str, ...]) -> None:
    cluster = ThreadCluster(with_adapters(quiet_config(2, 2, num_redundant=64), modules))

    def stop_one() -> None:
        cluster.group.workers[serving_name(cluster, role, 1)].stop()

    with serving(cluster):
        play_until(cluster, SMALL, modules, stop_one)
        if role == "attention":
            attention = cluster.group.attention(serving_name(cluster, role, 1))
            assert len(attention.engine.adapters.keys) == 2


LAYOUTS: dict[str, tuple[tuple[int, int], dict[str, Any], str]] = {
    "attention": ((2, 2), {}, "attention"),
    "only-attention": ((1, 2), {}, "attention"),
    "local": ((1, 1), {"mode": "local"}, "attention"),
    "expert": ((1, 2), {"num_redundant": 64}, "expert"),
    "expert-without-copies": ((1, 2), {}, "expert"),
    "colocated": ((0, 3), {"mode": "colocated"}, "colocated"),
}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_worker(layout: str, form: Form, modules: tuple[str, ...]) -> None:
    pools, options, role = LAYOUTS[layout]
    config, draw = with_adapters(row_config(*pools, **options), modules), random.Random(3)
    with connected_ray(), serving(RayCluster(config)) as cluster:
        play_until(cluster, form, modules, lambda: kill_any(cluster, role, draw))


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_worker_while_an_adapter_is_unloaded(modules: tuple[str, ...]) -> None:
    """Requests of the lost worker go on with it at the other one."""
    config, draw = with_adapters(row_config(2, 2), modules), random.Random(5)
    folder = Path(modules[0].partition("=")[2])
    with connected_ray(), serving(RayCluster(config)) as cluster:

        def fault() -> None:
            cluster.call("begin", "unload_adapter", {"name": "sql"})
            kill_any(cluster, "attention", draw)

        def restore() -> None:
            cluster.wait(lambda s: [a["name"] for a in s["adapters"]] == ["chat"])
            cluster.call("begin", "load_adapter", {"name": "sql", "path": str(folder)})

        play_until(cluster, SMALL, modules, fault, restore)
        play(cluster, SMALL, modules, lambda: None, draw)
