"""What new workers read, from where, and what happens when they cannot come."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.cluster_gateway import ClusterGateway, gateway_of
from benchmarks.harness.mixed_calls import make_calls
from benchmarks.harness.serving_cluster import (
    RayCluster,
    ServingCluster,
    ThreadCluster,
    ThreadWorkerGroup,
    connected_ray,
    serving,
)
from cluster.config.cluster import ClusterConfig
from cluster.launch.model_source import bundled_checkpoint
from tests.harness.fault_rows import (
    SMALL,
    check_answers,
    kill,
    quiet_config,
    undisturbed,
    wait_operation,
)
from tests.harness.hindered_workers import HINDERED_CLASSES, HinderedExpert, Hindrance
from tests.system.faults.test_scaling import scale

FILE = "model.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the bundled checkpoint."""
    return Path(shutil.copytree(bundled_checkpoint(), tmp_path / "model"))


def config_of(checkpoint: Path, config: ClusterConfig) -> ClusterConfig:
    """The same with the copy."""
    return replace(config, model=replace(config.model, path=str(checkpoint)))


def threads(checkpoint: Path) -> ThreadCluster:
    group = ThreadWorkerGroup(by_role={"expert": HinderedExpert})
    return ThreadCluster(config_of(checkpoint, quiet_config(1, 2)), group)


def read_bytes(cluster: ServingCluster, name: str) -> dict[str, float]:
    """By source, the bytes of experts that a worker has read."""
    kinds = {k: f'expert_weights_read_bytes_total{{source="{k}"}}' for k in ("checkpoint", "peer")}

    def stats(snapshot: dict[str, Any]) -> dict[str, float]:
        (entry,) = [w for w in snapshot["workers"] if w["name"] == name]
        found: dict[str, float] = entry["stats"]
        return found

    snapshot = cluster.wait(lambda s: kinds["peer"] in stats(s), fresh=True)
    return {kind: stats(snapshot)[text] for kind, text in kinds.items()}


def check_serving(gateway: ClusterGateway, name: str) -> None:
    """The streams get what they always get."""
    calls = make_calls(SMALL.num_streams, SMALL.num_tokens)
    check_answers(gateway.stream(calls, name).finish(), undisturbed(SMALL))


@contextmanager
def hindered(checkpoint: Path, hindrance: Hindrance) -> Iterator[None]:
    (checkpoint / hindrance).touch()
    try:
        yield
    finally:
        (checkpoint / hindrance).unlink(missing_ok=True)


def test_experts_come_from_other_workers_where_the_disk_is_slower(checkpoint: Path) -> None:
    with serving(threads(checkpoint)) as cluster, gateway_of(cluster) as gateway:
        assert read_bytes(cluster, "expert-0")["peer"] == 0
        with hindered(checkpoint, Hindrance.SLOW_DISK):
            assert scale(cluster, expert=3)["state"] == "SUCCEEDED"
        slow = read_bytes(cluster, "expert-2")
        assert slow["peer"] > 4 * slow["checkpoint"] > 0
        check_serving(gateway, "peer")


def test_experts_come_from_other_workers_where_the_disk_breaks(checkpoint: Path) -> None:
    with serving(threads(checkpoint)) as cluster, gateway_of(cluster) as gateway:
        with hindered(checkpoint, Hindrance.BROKEN_DISK):
            assert scale(cluster, expert=3)["state"] == "SUCCEEDED"
        read = read_bytes(cluster, "expert-2")
        assert read["peer"] > read["checkpoint"] == 0
        check_serving(gateway, "peer")


def change_in_place(checkpoint: Path) -> bytes:
    """Other weights of the same size are written into the file; what was there."""
    before = (checkpoint / FILE).read_bytes()
    middle = len(before) // 2
    (checkpoint / FILE).write_bytes(before[:middle] + bytes(len(before) - middle))
    return before


def test_a_worker_with_another_checkpoint_leaves_the_cluster_as_it_was(checkpoint: Path) -> None:
    with serving(threads(checkpoint)) as cluster, gateway_of(cluster) as gateway:
        before = change_in_place(checkpoint)
        failed = scale(cluster, attention=2, expert=3)
        check_as_before(cluster, failed, "checkpoint of")
        check_serving(gateway, "other")
        (checkpoint / FILE).write_bytes(before)
        assert scale(cluster, attention=2, expert=3)["state"] == "SUCCEEDED"
        check_serving(gateway, "again")


def test_a_worker_of_another_arithmetic_leaves_the_cluster_as_it_was(checkpoint: Path) -> None:
    with serving(threads(checkpoint)) as cluster, gateway_of(cluster) as gateway:
        with hindered(checkpoint, Hindrance.OTHER_CPU):
            failed = scale(cluster, expert=3)
        check_as_before(cluster, failed, "expert-2 computes with another, the others with")
        check_serving(gateway, "other")
        assert scale(cluster, expert=3)["state"] == "SUCCEEDED"
        check_serving(gateway, "again")


def states(snapshot: dict[str, Any]) -> set[tuple[str, str]]:
    """Name and state of every worker."""
    return {(w["name"], w["state"]) for w in snapshot["workers"]}


def check_as_before(cluster: ServingCluster, failed: dict[str, Any], words: str) -> None:
    """The scaling has failed for this reason, and nothing has changed."""
    assert failed["state"] == "FAILED"
    assert words in failed["message"]
    snapshot = cluster.snapshot()
    assert snapshot["state"] == "SERVING"
    assert snapshot["generation"] == 1
    assert snapshot["problems"] == []


@pytest.mark.ray
@pytest.mark.slow
def test_actors_that_cannot_come_leave_the_cluster_as_it_was(checkpoint: Path) -> None:
    """No room, a new worker killed while it loads; then it is tried again with a slow disk."""
    config = config_of(checkpoint, quiet_config(1, 2, workers={"cpus_per_worker": 0.5}))
    with (
        connected_ray(),
        serving(RayCluster(config, HINDERED_CLASSES)) as cluster,
        gateway_of(cluster) as gateway,
    ):
        failed = scale(cluster, attention=2, expert=3, limit_s=3.0)  # two CPUs have room for one
        check_as_before(cluster, failed, "could not start workers within 3 s")
        check_serving(gateway, "no-room")
        with hindered(checkpoint, Hindrance.HELD):
            begun = cluster.call("begin", "scale", {"expert": 3, "limit_s": 120.0})
            new = "expert-2.2"
            cluster.wait(lambda s: (new, "LOADING") in states(s))
            kill(cluster, new)
            failed = wait_operation(cluster, begun["id"])
        check_as_before(cluster, failed, f"{new} was lost before it served")
        check_serving(gateway, "killed")
        with hindered(checkpoint, Hindrance.SLOW_DISK):
            done = scale(cluster, expert=3)
        assert done["state"] == "SUCCEEDED", done
        (added,) = done["result"]["added"]
        read = read_bytes(cluster, added)
        assert read["peer"] > 4 * read["checkpoint"] > 0
        check_serving(gateway, "again")
