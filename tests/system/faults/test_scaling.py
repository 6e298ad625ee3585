"""Workers are added and removed while streams are under way: no request fails, no token differs."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from benchmarks.faults.layouts import row_config
from benchmarks.harness.cluster_gateway import gateway_of
from benchmarks.harness.mixed_calls import make_calls
from benchmarks.harness.serving_cluster import (
    RayCluster,
    ServingCluster,
    ThreadCluster,
    ThreadWorkerGroup,
    connected_ray,
    serving,
)
from benchmarks.harness.stalls import wait_until
from cluster.core.errors import ConflictError, RequestError
from tests.harness.fault_rows import (
    FULL,
    SMALL,
    Form,
    blocks_held,
    check_answers,
    kill,
    quiet_config,
    undisturbed,
    wait_operation,
)
from workers.process.context import WorkerContext
from workers.process.worker.worker import Worker
from workers.process.worker_args import WorkerArgs


def scale(cluster: ServingCluster, limit_s: float = 120.0, **counts: int) -> dict[str, Any]:
    """Order a scaling and wait for its end; the operation."""
    begun = cluster.call("begin", "scale", {**counts, "limit_s": limit_s})
    return wait_operation(cluster, begun["id"])


def serving_roles(cluster: ServingCluster) -> list[str]:
    """Roles of the workers that serve, in order."""
    workers = cluster.snapshot()["workers"]
    return sorted(w["role"] for w in workers if w["state"] == "SERVING")


def num_lost(cluster: ServingCluster) -> int:
    """Losses in the history."""
    return sum(e["cause"].startswith("lost") for e in cluster.snapshot()["history"])


def go_through(cluster: ServingCluster, form: Form, orders: list[dict[str, int]]) -> None:
    """Scale under load, in this order; clients ask again and again, and notice nothing."""
    expected = undisturbed(form)
    calls = make_calls(form.num_streams, form.num_tokens)
    lost_before = num_lost(cluster)

    def carry_out() -> list[dict[str, Any]]:
        return [scale(cluster, **order) for order in orders]

    with ThreadPoolExecutor(1) as pool, gateway_of(cluster) as gateway:
        done: Future[list[dict[str, Any]]] | None = None
        rounds = 0
        while done is None or not done.done():
            streams = gateway.stream(calls, f"round-{rounds}")
            streams.wait_tokens(form.num_streams)
            done = done or pool.submit(carry_out)
            check_answers(streams.finish(), expected)
            rounds += 1
        operations = done.result()
        check_answers(gateway.stream(calls, "after").finish(), expected)
    assert {operation["state"] for operation in operations} == {"SUCCEEDED"}, operations
    assert cluster.snapshot()["state"] == "SERVING"
    assert num_lost(cluster) == lost_before
    cluster.wait(lambda snapshot: blocks_held(snapshot) == 0, fresh=True)  # a fetch may still end


TO_AND_FRO = [{"attention": 2, "expert": 3}, {"attention": 1, "expert": 1}, {"expert": 2}]
TO_AND_BACK = [{"attention": 2, "expert": 3}, {"attention": 1, "expert": 2}]


@pytest.mark.parametrize(
    "transport",
    ["sockets", pytest.param("collective", marks=pytest.mark.slow)],
)
def test_two_pools_grow_and_shrink_under_load(transport: str) -> None:
    with serving(ThreadCluster(quiet_config(1, 2, transport=transport))) as cluster:
        go_through(cluster, SMALL, TO_AND_FRO)
        assert serving_roles(cluster) == ["attention", "expert", "expert"]
        assert isinstance(cluster, ThreadCluster)
        assert len(cluster.group.workers) == 3
        assert {"attention-1", "expert-2"} <= set(cluster.group.released)


@pytest.mark.slow
def test_colocated_workers_grow_and_shrink_under_load() -> None:
    with serving(ThreadCluster(quiet_config(1, 2, mode="colocated"))) as cluster:
        go_through(cluster, SMALL, [{"expert": 3}, {"expert": 1}, {"expert": 2}])
        assert serving_roles(cluster) == ["colocated", "colocated"]


def test_a_worker_of_everything_cannot_be_scaled() -> None:
    with (
        serving(ThreadCluster(quiet_config(1, 1, mode="local"))) as cluster,
        pytest.raises(ConflictError, match=r"one worker holds everything \(--mode local\)"),
    ):
        scale(cluster, expert=2)


def test_more_workers_than_experts_are_refused() -> None:
    with serving(ThreadCluster(quiet_config(1, 2))) as cluster:
        with pytest.raises(RequestError, match=r"expert \(65\) must not exceed the 64 experts"):
            scale(cluster, expert=65)
        assert serving_roles(cluster) == ["attention", "expert", "expert"]


class FailingGroup(ThreadWorkerGroup):
    """New workers cannot read their weights while ``is_broken``."""

    is_broken = False

    def make_worker(self, args: WorkerArgs) -> Worker:
        worker = super().make_worker(args)
        if self.is_broken:

            def fail(context: WorkerContext) -> dict[str, Any]:
                raise OSError("the disk is gone")

            worker.load = fail  # type: ignore[method-assign]
        return worker


def test_a_worker_that_cannot_load_leaves_the_cluster_as_it_was() -> None:
    group = FailingGroup()
    with serving(ThreadCluster(quiet_config(1, 2), group)) as cluster:
        before = cluster.call("placement")
        group.is_broken = True
        failed = scale(cluster, attention=2, expert=3)
        assert failed["state"] == "FAILED"
        assert "the disk is gone" in failed["message"]
        assert cluster.snapshot()["state"] == "SERVING"
        assert cluster.snapshot()["generation"] == 1
        assert cluster.call("placement")["banks"] == before["banks"]
        wait_until(lambda: len(group.workers) == 3, "the end of the new workers", 30.0)
        group.is_broken = False
        assert scale(cluster, expert=3)["state"] == "SUCCEEDED"
        assert "expert-2.2" in group.workers


@pytest.mark.slow
def test_a_scaling_goes_on_when_the_controller_dies() -> None:
    with serving(ThreadCluster(quiet_config(1, 2))) as cluster:
        assert isinstance(cluster, ThreadCluster)
        for counts in ({"attention": 2, "expert": 3}, {"attention": 1, "expert": 2}):
            begun = cluster.call("begin", "scale", {**counts, "limit_s": 120.0})
            cluster.crash_controller()
            cluster.restore()
            done = wait_operation(cluster, begun["id"])
            assert done["state"] == "SUCCEEDED", done
        assert serving_roles(cluster) == ["attention", "expert", "expert"]


@pytest.mark.ray
def test_actors_are_added_and_removed() -> None:
    with connected_ray(), serving(RayCluster(row_config(1, 2))) as cluster:
        go_through(cluster, SMALL, TO_AND_BACK)
        assert serving_roles(cluster) == ["attention", "expert", "expert"]


@pytest.mark.ray
@pytest.mark.slow
def test_an_added_actor_is_replaced_in_its_own_place() -> None:
    with connected_ray(), serving(RayCluster(row_config(1, 2))) as cluster:
        assert scale(cluster, attention=2, expert=3)["state"] == "SUCCEEDED"
        for name in ("attention-1", "expert-2"):
            kill(cluster, name)
            cluster.wait(lambda s: s["state"] != "SERVING")
            cluster.wait(lambda s: s["state"] == "SERVING")
            assert cluster.worker(f"{name}.2")["state"] == "SERVING"
        go_through(cluster, FULL, [{"attention": 1, "expert": 1}])
