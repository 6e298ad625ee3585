"""Workers on several Ray nodes (processes of this host): spreading, ranks, ending elsewhere."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray

from benchmarks.harness.serving_cluster import end_shared_ray
from benchmarks.harness.stalls import wait_until
from cluster.actors.ray_tools import cluster_nodes, live_actor_names
from cluster.actors.worker_group import WorkerGroup
from cluster.config.workers import WorkersSection
from cluster.core.errors import StartError
from cluster.core.fleets import NAMESPACE
from cluster.core.topology import Member
from cluster.launch import local_ray
from cluster.sizing.start_plan import StartPlan, plan_start
from tests.cluster.actors.ray_workers import StubbornWorker, TrivialWorker
from tests.cluster.controller.fakes_cluster import CONFIG

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LIMIT_S = 120.0


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[None]:
    end_shared_ray()
    with tempfile.TemporaryDirectory(prefix="em", dir="/tmp") as folder:
        context = local_ray.init_ray(Path(folder), num_cpus=1)
        address = context.address_info["gcs_address"]
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1"]
        others = []
        for count in (2, 3):  # one after the other: two at once take each other's ports
            others.append(
                subprocess.Popen(
                    [*command, f"--address={address}"],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=os.environ | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"},
                )
            )
            wait_until(lambda: len(cluster_nodes()) == count, "the node", LIMIT_S)  # noqa: B023
        yield
        for other in others:
            other.terminate()
        for other in others:
            other.wait(LIMIT_S)
        ray.shutdown()


def test_the_workers_of_a_node_that_got_a_signal_are_leaving() -> None:
    """Ray empties a node whose ``ray start`` got SIGTERM before it ends it."""
    end_shared_ray()
    with tempfile.TemporaryDirectory(prefix="em", dir="/tmp") as folder:
        context = local_ray.init_ray(Path(folder), num_cpus=1)
        address = context.address_info["gcs_address"]
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1"]
        other = subprocess.Popen(
            [*command, f"--address={address}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "60"},
        )
        try:
            wait_until(lambda: len(cluster_nodes()) == 2, "the other node", LIMIT_S)
            asyncio.run(_leave(other))
            other.wait(LIMIT_S)  # the node is idle: it ends by itself
        finally:
            other.kill()
            ray.shutdown()


async def _leave(node: subprocess.Popen[bytes]) -> None:
    """Start a worker on each of two nodes, and end one of the nodes."""
    group = WorkerGroup({"attention": TrivialWorker, "expert": TrivialWorker})
    plan = _plan(1)
    members = group.reserve(plan.config.workers, LIMIT_S)
    await _start(group, members, plan)
    assert group.draining_nodes() == frozenset()
    node.send_signal(signal.SIGTERM)
    here = ray.get_runtime_context().get_node_id()
    (away,) = (name for name, node_id in group.room.nodes.items() if node_id != here)
    deadline = time.monotonic() + LIMIT_S
    while [
        n for n, node in group.node_ids_by_worker().items() if node in group.draining_nodes()
    ] != [away]:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    await group.end_all()


def _plan(num_experts: int) -> StartPlan:
    """With as many expert workers, and an attention worker."""
    workers = WorkersSection(mode="disaggregated", num_expert_workers=num_experts)
    return plan_start(replace(CONFIG, workers=workers), [], cluster_nodes())


async def _start(group: WorkerGroup, members: Sequence[Member], plan: StartPlan) -> None:
    """Start workers that find no controller, and live."""
    with pytest.raises(StartError, match="cannot connect to"):
        await group.start(members, plan, "127.0.0.1:1")


def _pid(actor: object) -> int:
    """Runs in a worker."""
    return os.getpid()


@pytest.mark.usefixtures("three_nodes")
def test_workers_are_spread_ranked_by_node_and_ended_on_theirs() -> None:
    async def body() -> None:
        group = WorkerGroup({"attention": TrivialWorker, "expert": StubbornWorker})
        plan = _plan(3)
        assert plan.share.cpus == 0.5  # 0.75 would leave the fourth worker without a node
        members = group.reserve(plan.config.workers, LIMIT_S)
        assert [m.name for m in members] == ["attention-0", "expert-0", "expert-1", "expert-2"]
        order = [n.node_id for n in cluster_nodes()]
        nodes = [group.room.nodes[f"expert-{i}"] for i in range(3)]
        assert len(set(group.room.nodes.values())) == 3
        assert [order.index(n) for n in nodes] == sorted(order.index(n) for n in nodes)

        await _start(group, members, plan)
        actors = [ray.get_actor(m.name, namespace=NAMESPACE) for m in members]
        pids: list[int] = ray.get([actor.__ray_call__.remote(_pid) for actor in actors])
        os.kill(pids[-1], signal.SIGSTOP)
        await group.end_all()
        assert live_actor_names() == []
        gone = psutil.wait_procs([psutil.Process(p) for p in pids if psutil.pid_exists(p)], LIMIT_S)
        assert not gone[1]

    asyncio.run(body())
