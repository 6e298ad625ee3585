"""Real worker actors in one local Ray cluster: start, failures of a start, kill -9, stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
import ray
from ray._private.state import state
from ray.exceptions import RayActorError
from ray.util.placement_group import placement_group_table

from benchmarks.harness.serving_cluster import QUIET_S, connected_ray
from benchmarks.harness.stalls import Limit, wait_until
from cluster.actors.controller_client import create_controller
from cluster.actors.ray_tools import (
    claim_term,
    cluster_nodes,
    free_resources,
    live_actor_names,
)
from cluster.actors.worker_group import WorkerGroup
from cluster.config.cluster import ClusterConfig
from cluster.config.model import ModelSection
from cluster.config.transport import TransportSection
from cluster.config.workers import WorkersSection
from cluster.controller.settings import ControllerSettings
from cluster.core.errors import ConfigError
from cluster.core.fleets import NAMESPACE
from cluster.core.node_labels import DEVICE_SPEED, FAILURE_DOMAIN, LINK_CLASS
from cluster.core.topology import Member
from cluster.launch.teardown import end_leftovers
from cluster.sizing.start_plan import plan_start
from tests.cluster.actors import ray_workers

pytestmark = pytest.mark.ray

BANKS = [{"bank": "mlp", "layer": 0, "num_experts": 8}]
LIMIT_S = 120.0


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with connected_ray(labels={FAILURE_DOMAIN: "rack-7", LINK_CLASS: "pod-2", DEVICE_SPEED: "0.5"}):
        yield


def _config(
    num_experts: int = 2, num_redundant: int = 0, cpus: float | None = None
) -> dict[str, Any]:
    return ClusterConfig(
        model=ModelSection(path="somewhere", served_model_name="demo"),
        workers=WorkersSection(
            num_expert_workers=num_experts,
            num_redundant_experts=num_redundant,
            cpus_per_worker=cpus,
        ),
        transport=TransportSection(detection_limit_s=QUIET_S),
        cluster_token="secret",
    ).to_dict()


@contextmanager
def _controller(
    expert_class: type = ray_workers.TrivialWorker,
    attention_class: type = ray_workers.TrivialWorker,
) -> Iterator[Any]:
    """A controller actor that is ended with everything it started."""
    controller = create_controller(
        WorkerGroup({"attention": attention_class, "expert": expert_class})
    )
    try:
        yield controller
    finally:
        ray.get(controller.stop.remote(), timeout=LIMIT_S)
        ray.kill(controller)
        wait_until(lambda: not live_actor_names(), "the end of all actors")


def _until(controller: Any, *states: str) -> dict[str, Any]:
    return _until_so(controller, lambda snapshot: snapshot["state"] in states)


def _until_ran(controller: Any, generation: int) -> dict[str, Any]:
    """The state once this generation has run; a later one may run by then."""

    def has_run(snapshot: dict[str, Any]) -> bool:
        return any(
            e["generation"] >= generation and e["took_s"] is not None for e in snapshot["history"]
        )

    return _until_so(controller, has_run)


def _until_so(controller: Any, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    limit = Limit(LIMIT_S)
    snapshot: dict[str, Any] = ray.get(controller.snapshot.remote(), timeout=LIMIT_S)
    while not is_so(snapshot):
        assert not limit.is_over(), snapshot
        wait = controller.wait_snapshot.remote(snapshot["version"], 5.0)
        snapshot = ray.get(wait, timeout=LIMIT_S)
    return snapshot


def _pids(snapshot: dict[str, Any]) -> dict[str, int]:
    return {w["name"]: w["pid"] for w in snapshot["workers"]}


def _is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _nothing_is_left() -> bool:
    groups = placement_group_table().values()
    return not live_actor_names() and all(g["state"] == "REMOVED" for g in groups)


class Bystander:
    """Somebody else's actor."""

    def ping(self) -> str:
        return "here"


def _told_threads(controller: Any) -> set[float | None]:
    """The current report of every worker; None where one is too busy to answer."""
    fresh = ray.get(controller.snapshot.remote(True), timeout=LIMIT_S)
    return {w["stats"].get("threads") for w in fresh["workers"]}


@pytest.mark.usefixtures("local_ray")
def test_workers_start_lose_one_and_stop_without_touching_others() -> None:
    kind: Any = ray.remote(Bystander)
    bystander = kind.options(name="expert-1", namespace="others", num_cpus=0).remote()
    assert ray.get(bystander.ping.remote(), timeout=LIMIT_S) == "here"
    with _controller() as controller:
        ray.get(controller.start.remote(_config(3, 5), BANKS), timeout=LIMIT_S)
        snapshot = _until(controller, "SERVING", "STOPPED")
        assert snapshot["state"] == "SERVING", snapshot["error"]
        pids = _pids(snapshot)
        assert sorted(pids) == ["attention-0", "expert-0", "expert-1", "expert-2"]
        assert {w["node"] for w in snapshot["workers"]} == {cluster_nodes()[0].address}
        wait_until(lambda: _told_threads(controller) == {1.0}, "threads")
        wait_until(lambda: free_resources().get("CPU", 0.0) < 0.001, "4 shares of 0.5 of 2")
        assert create_controller(WorkerGroup({})) == controller

        os.kill(pids["expert-1"], signal.SIGKILL)
        snapshot = _until_ran(controller, 2)
        assert "its control connection closed" in snapshot["history"][1]["cause"]
        assert snapshot["experts_complete"]
        snapshot = _until_ran(controller, 3)
        assert snapshot["state"] == "SERVING"
        states = {w["name"]: w["state"] for w in snapshot["workers"]}
        assert states.pop("expert-1") == "LOST"
        assert sorted(states) == ["attention-0", "expert-0", "expert-1.2", "expert-2"]
        assert set(states.values()) == {"SERVING"}
        pids = _pids(snapshot)

        ray.get(controller.stop.remote(), timeout=LIMIT_S)
        assert all(_is_gone(pid) for pid in pids.values())
        assert _until(controller, "STOPPED")["error"] is None
    assert ray.get(bystander.ping.remote(), timeout=LIMIT_S) == "here"
    wait_until(_nothing_is_left, "the end of all actors")
    ray.kill(bystander)


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (ray_workers.BrokenWorker, "ValueError: the shape of lm_head is wrong"),
        (ray_workers.BrokenStartWorker, "OSError: no free port"),
        (ray_workers.FailingWorker, "layer 3 is missing"),
        (ray_workers.SilentWorker, "RuntimeError: the checkpoint has no config.json"),
        (ray_workers.DyingWorker, "The actor is dead because its worker process has died"),
    ],
)
def test_one_failing_worker_ends_the_whole_start_in_its_own_words(kind: type, error: str) -> None:
    with _controller(attention_class=kind) as controller:
        ray.get(controller.start.remote(_config(1), BANKS), timeout=LIMIT_S)
        snapshot = _until(controller, "STOPPED")
        assert snapshot["error"].startswith(f"attention-0: {error}")
        wait_until(lambda: live_actor_names() == ["expertmesh-controller"], "the end of workers")
        assert all(_is_gone(pid) for pid in _pids(snapshot).values() if pid)
    wait_until(_nothing_is_left, "the end of all actors")


def _has_process(actor: Any, name: str) -> bool:
    """Runs in the controller: whether it knows that a worker has a process."""
    workers = actor.runner.controller.cluster.workers
    return name in workers and bool(workers[name].has_process)


def _let_start_limit_pass(actor: Any, name: str) -> None:
    """Runs in the controller: a worker has had its process for that long."""
    actor.runner.controller.cluster.workers[name].since -= ControllerSettings().start_limit_s


@pytest.mark.usefixtures("local_ray")
def test_a_constructor_that_hangs_is_ended_at_the_start_limit() -> None:
    with _controller(expert_class=ray_workers.HangingWorker) as controller:
        ray.get(controller.start.remote(_config(2, 8), BANKS), timeout=LIMIT_S)
        pids = _pids(_until(controller, "SERVING"))
        os.kill(pids["expert-1"], signal.SIGKILL)
        _until_ran(controller, 2)

        def in_controller(function: Callable[..., Any], name: str) -> Any:
            return ray.get(controller.__ray_call__.remote(function, name), timeout=LIMIT_S)

        wait_until(lambda: in_controller(_has_process, "expert-1.2"), "the new worker's process")
        hanging = ray.get_actor("expert-1.2", namespace=NAMESPACE)
        pid = int(state.actor_table(hanging._actor_id.hex())["Pid"])
        assert not _is_gone(pid)
        in_controller(_let_start_limit_pass, "expert-1.2")
        wait_until(lambda: _is_gone(pid), "the end of the process that hangs")
        wait_until(lambda: in_controller(_has_process, "expert-1.3"), "another try")
        snapshot = _until(controller, "DEGRADED")
        assert any("not ready within" in event["cause"] for event in snapshot["history"])
    wait_until(_nothing_is_left, "the end of all actors")


def _snapshot(controller: Any) -> dict[str, Any]:
    found: dict[str, Any] = ray.get(controller.snapshot.remote(), timeout=LIMIT_S)
    return found


def _restarted(controller: Any, pid: int) -> dict[str, Any]:
    """The state as another process of the controller reports it."""
    limit = Limit(LIMIT_S)
    while not limit.is_over():
        with contextlib.suppress(RayActorError):
            snapshot: dict[str, Any] = ray.get(controller.snapshot.remote(), timeout=LIMIT_S)
            if snapshot["controller_pid"] != pid:
                return snapshot
        time.sleep(0.05)
    raise TimeoutError("the controller was not restarted")


@pytest.mark.usefixtures("local_ray")
def test_a_killed_controller_comes_back_and_keeps_the_workers_that_live() -> None:
    with _controller() as controller:
        ray.get(controller.start.remote(_config(3, 5), BANKS), timeout=LIMIT_S)
        before = _until(controller, "SERVING")
        os.kill(before["controller_pid"], signal.SIGKILL)
        after = _restarted(controller, before["controller_pid"])
        assert (after["state"], after["generation"], after["term"]) == ("SERVING", 1, 2)
        assert _pids(after) == _pids(before)
        assert after["version"] > before["version"]
        os.kill(after["controller_pid"], signal.SIGKILL)
        os.kill(_pids(after)["expert-1"], signal.SIGKILL)
        _restarted(controller, after["controller_pid"])
        snapshot = _until_ran(controller, 3)
        assert (snapshot["state"], snapshot["term"]) == ("SERVING", 3)
        assert "expert-1.2" in {w["name"] for w in snapshot["workers"]}
        pids = _pids(snapshot)
        ray.get(controller.stop.remote(), timeout=LIMIT_S)
        assert all(_is_gone(pid) for pid in pids.values())
    wait_until(_nothing_is_left, "the end of all actors")


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_controller_that_stands_still_is_replaced() -> None:
    with _controller() as controller:
        ray.get(controller.start.remote(_config(3, 5), BANKS), timeout=LIMIT_S)
        before = _until(controller, "SERVING")
        os.kill(before["controller_pid"], signal.SIGSTOP)
        os.kill(_pids(before)["expert-1"], signal.SIGKILL)
        _restarted(controller, before["controller_pid"])
        snapshot = _until_ran(controller, 3)
        assert (snapshot["state"], snapshot["term"]) == ("SERVING", 2)
        ray.get(controller.stop.remote(), timeout=LIMIT_S)
    wait_until(_nothing_is_left, "the end of all actors")


@pytest.mark.usefixtures("local_ray")
def test_a_controller_is_restarted_when_a_stale_one_has_claimed_a_later_term() -> None:
    """Clients find only the one that Ray restarts, so that one must lead."""
    with _controller() as controller:
        ray.get(controller.start.remote(_config(3, 5), BANKS), timeout=LIMIT_S)
        before = _until(controller, "SERVING")
        assert claim_term("a stale controller") == 2
        os.kill(_pids(before)["expert-1"], signal.SIGKILL)
        after = _restarted(controller, before["controller_pid"])
        assert (after["state"], after["term"]) == ("SERVING", 3)
        ray.get(controller.stop.remote(), timeout=LIMIT_S)
    wait_until(_nothing_is_left, "the end of all actors")


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_worker_that_is_frozen_while_the_controller_restarts_is_ended() -> None:
    """It does not answer: its name is enough to end it."""
    with _controller() as controller:
        ray.get(controller.start.remote(_config(3, 5), BANKS), timeout=LIMIT_S)
        before = _until(controller, "SERVING")
        frozen = _pids(before)["expert-1"]
        os.kill(frozen, signal.SIGSTOP)
        os.kill(before["controller_pid"], signal.SIGKILL)
        _restarted(controller, before["controller_pid"])
        snapshot = _until_ran(controller, 3)
        assert "expert-1.2" in {w["name"] for w in snapshot["workers"]}
        wait_until(lambda: _is_gone(frozen), "its end")
        assert "expert-1" not in live_actor_names()
        ray.get(controller.stop.remote(), timeout=LIMIT_S)
    wait_until(_nothing_is_left, "the end of all actors")


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_controller_that_dies_before_the_cluster_serves_ends_the_start() -> None:
    with _controller(attention_class=ray_workers.SilentWorker) as controller:
        ray.get(controller.start.remote(_config(1), BANKS), timeout=LIMIT_S)
        pid = _snapshot(controller)["controller_pid"]
        wait_until(lambda: _pids(_snapshot(controller))["expert-0"], "a worker that called")
        os.kill(pid, signal.SIGKILL)
        snapshot = _restarted(controller, pid)
        assert snapshot["state"] == "STOPPED"
        assert snapshot["error"] == "the controller was lost before the cluster served"
    wait_until(_nothing_is_left, "the end of all actors")


@pytest.mark.usefixtures("local_ray")
def test_stopped_and_stubborn_workers_are_ended_by_pid() -> None:
    with _controller(expert_class=ray_workers.StubbornWorker) as controller:
        ray.get(controller.start.remote(_config(1), BANKS), timeout=LIMIT_S)
        pids = _pids(_until(controller, "SERVING"))
        os.kill(pids["attention-0"], signal.SIGSTOP)
        ray.get(controller.stop.remote(), timeout=LIMIT_S)
        assert all(_is_gone(pid) for pid in pids.values())
    wait_until(_nothing_is_left, "the end of all actors")


@pytest.mark.usefixtures("local_ray")
def test_what_is_not_there_is_refused_before_anything_is_created() -> None:
    with _controller() as controller:
        with pytest.raises(ConfigError, match="cpus_per_worker") as caught:
            ray.get(controller.start.remote(_config(cpus=1.0), BANKS), timeout=LIMIT_S)
        assert isinstance(caught.value.cause, ConfigError)  # type: ignore[attr-defined]
        assert live_actor_names() == ["expertmesh-controller"]
    wait_until(_nothing_is_left, "the end of all actors")


@pytest.mark.usefixtures("local_ray")
def test_members_are_where_the_labels_of_their_nodes_say() -> None:
    async def body() -> tuple[Member, ...]:
        group = WorkerGroup({})
        config = ClusterConfig.from_dict(_config())
        plan = plan_start(config, BANKS, cluster_nodes())
        members = group.reserve(plan.config.workers, LIMIT_S)
        await group.end_all()
        return members

    members = asyncio.run(body())
    assert [m.name for m in members] == ["attention-0", "expert-0", "expert-1"]
    assert {(m.domain, m.link_class, m.speed) for m in members} == {("rack-7", "pod-2", 0.5)}
    wait_until(_nothing_is_left, "the end of all actors")


@pytest.mark.usefixtures("local_ray")
def test_leftovers_are_found_by_name() -> None:
    worker: Any = ray.remote(ray_workers.TrivialWorker)
    options = {"name": "expert-7", "namespace": NAMESPACE, "lifetime": "detached", "num_cpus": 0}
    kept = worker.options(**options).remote(
        {"cluster_token": ""}, {"name": "expert-7"}, "127.0.0.1:1", {"threads": 1}
    )
    assert ray.get(kept.ping.remote(), timeout=LIMIT_S) == "expert-7"
    assert end_leftovers() == ["expert-7"]
    wait_until(_nothing_is_left, "the end of all actors")
