"""Workers on several Ray nodes (processes of this host): spreading, ranks, ending elsewhere."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from cluster.actors.ray_tools import cluster_nodes, our_actors
from cluster.actors.worker_group import WorkerGroup, _Actor
from cluster.config.cluster import WorkersSection
from cluster.config.resources import plan_shares
from cluster.core.errors import StartError
from cluster.core.topology import Member
from cluster.launch import local_ray
from tests.cluster.actors.ray_workers import StubbornWorker, TrivialWorker
from tests.harness.serving_cluster import end_shared_ray
from tests.harness.stalls import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LIMIT_S = 120.0


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[None]:
    end_shared_ray()
    with tempfile.TemporaryDirectory(prefix="em", dir="/tmp") as folder:
        context = local_ray.begin(Path(folder), num_cpus=1)
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


class Guest:
    """Keeps its node from being idle."""

    def where(self) -> str:
        return str(ray.get_runtime_context().get_node_id())


def test_the_workers_of_a_node_that_got_a_signal_are_leaving() -> None:
    """Ray empties a node whose ``ray start`` got SIGTERM before it ends it."""
    end_shared_ray()
    with tempfile.TemporaryDirectory(prefix="em", dir="/tmp") as folder:
        context = local_ray.begin(Path(folder), num_cpus=1)
        address = context.address_info["gcs_address"]
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1"]
        other = subprocess.Popen(
            [*command, '--resources={"other": 1}', f"--address={address}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "60"},
        )
        try:
            guest: Any = ray.remote(Guest).options(resources={"other": 1}).remote()
            node = str(ray.get(guest.where.remote(), timeout=LIMIT_S))
            group = WorkerGroup({})
            member = Member(name="expert-0", role="expert", rank=0, device=0)
            group._actors["expert-0"] = _Actor(member, guest, node)
            assert group.leaving() == []
            other.send_signal(signal.SIGTERM)
            wait_until(lambda: group.leaving() == ["expert-0"], "the worker to leave", LIMIT_S)
            ray.kill(guest)
            other.wait(LIMIT_S)  # the node is idle: it ends by itself
        finally:
            other.kill()
            ray.shutdown()


@pytest.mark.usefixtures("three_nodes")
def test_workers_are_spread_ranked_by_node_and_ended_on_theirs() -> None:
    async def body() -> None:
        group = WorkerGroup({"attention": TrivialWorker, "expert": StubbornWorker})
        share = plan_shares(WorkersSection(num_expert_workers=3), cluster_nodes())
        assert share.cpus == 0.5  # 0.75 would leave the fourth worker without a node
        members = await group.reserve({"attention": 1, "expert": 3}, share, LIMIT_S)
        assert [m.name for m in members] == ["attention-0", "expert-0", "expert-1", "expert-2"]
        order = [n.node_id for n in cluster_nodes()]
        nodes = [group._nodes[f"expert-{i}"] for i in range(3)]
        assert len(set(group._nodes.values())) == 3
        assert [order.index(n) for n in nodes] == sorted(order.index(n) for n in nodes)

        extras = {m.name: {"threads": 1} for m in members}
        with pytest.raises(StartError, match="cannot connect to"):
            await group.start(members, {"cluster_token": ""}, "127.0.0.1:1", extras)
        processes = [a.process for a in group._actors.values()]
        pids = [p.pid for p in processes if p is not None]
        os.kill(pids[-1], signal.SIGSTOP)
        await group.end_all()
        assert our_actors() == []
        gone = psutil.wait_procs([psutil.Process(p) for p in pids if psutil.pid_exists(p)], LIMIT_S)
        assert not gone[1]

    asyncio.run(body())
