"""A cluster whose numbers of workers follow its nodes, as the controller sees them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from cluster.config.workers import WorkersSection
from cluster.controller.drain_operation import DrainCommand
from cluster.controller.drain_requests import LATE_S
from cluster.controller.operations import Operation, OperationState
from cluster.controller.scale_operation import ScaleCommand
from cluster.core.codec import from_plain
from cluster.core.topology import Role
from cluster.policy.node_following import RETRY_S, SETTLE_S, FollowedNode
from tests.cluster.controller.controller_world import World
from tests.cluster.controller.fakes_cluster import CONFIG, FakeCluster
from tests.cluster.controller.test_drain import load_all, say_requests, switch
from tests.cluster.controller.test_drain_memory import restart, running, take_all
from tests.harness.tiers import quick_values

pytestmark = pytest.mark.heavy

FOLLOWING = dataclasses.replace(
    CONFIG, workers=WorkersSection(follow_nodes=True, num_attention_workers=2)
)


class Nodes:
    """A fake cluster on nodes with room for one worker each."""

    def __init__(self, num_attention: int = 2, num_experts: int = 2) -> None:
        self.cluster = FakeCluster(num_attention, num_experts, num_redundant=4, config=FOLLOWING)
        self.cluster.serve()
        self.of: dict[str, FollowedNode] = {}
        for name in sorted(r.name for r in self.cluster.known.workers):
            self.register(f"n-{name}", name)
        self.wait(SETTLE_S + 2)

    def register(self, node: str, *workers: str, role: Role = "expert") -> None:
        known: Role = "attention" if "attention" in node else role
        self.of[node] = FollowedNode(
            node_id=node, address=node, role=known, room=1, workers=workers
        )

    def leave(self, node: str) -> None:
        """Ray drains it."""
        self.of[node] = dataclasses.replace(self.of[node], leaves=True)
        for worker in self.of[node].workers:
            self.cluster.controller.draining.requested(worker, self.cluster.now, node_leaves=True)

    def wait(self, seconds: float) -> None:
        cluster = self.cluster
        for _ in range(round(seconds / 0.5)):
            coming = [r.name for r in cluster.known.workers.alive() if r.is_pending]
            cluster.beat_all(*coming)
            cluster.tick(0.5)
            cluster.controller.following.observe(list(self.of.values()), cluster.now)

    def bring_up(self, worker: str, node: str) -> None:
        """A worker starts there and joins."""
        self.register(node, worker)
        self.cluster.bring_up(worker)
        self.cluster.join_all()
        self.wait(1)

    def drained(self, *workers: str) -> None:
        """Workers that a drain names are emptied and end."""
        if load_all(self.cluster):
            switch(self.cluster)
        self.wait(1)
        for worker in workers:
            if "attention" in worker:
                say_requests(self.cluster, worker, 0.0)
        self.cluster.tick(0.1)
        self.cluster.join_all()
        self.wait(0.5)
        self.cluster.controller.draining.ended(workers, self.cluster.now)
        self.wait(0.5)

    @property
    def operations(self) -> list[Operation]:
        return list(self.cluster.known.operations.kept)

    def events(self) -> list[tuple[str, str]]:
        return [(e["cause"], e["effect"]) for e in self.cluster.known.history.to_list()]


def test_the_nodes_of_the_start_change_nothing() -> None:
    nodes = Nodes()
    assert nodes.operations == []
    assert nodes.cluster.known.known_nodes == nodes.of.keys()


def test_a_node_that_registers_is_used() -> None:
    nodes = Nodes()
    nodes.register("n-new")
    nodes.wait(SETTLE_S + 2)
    (operation,) = nodes.operations
    assert operation.kind == "scale"
    assert operation.target == "2 attention and 3 expert workers (node n-new registered)"
    assert ("node n-new registered", "scale-1.1 begins") in nodes.events()
    nodes.bring_up("expert-2", "n-new")
    assert operation.state is OperationState.SUCCEEDED
    assert nodes.cluster.state == "SERVING"
    nodes.wait(600)
    assert len(nodes.operations) == 1


@pytest.mark.parametrize(
    ("worker", "way"),
    quick_values(["expert-0", "expert-1", "attention-0"], ["Ray drains it", "its hook drains it"]),
)
def test_the_places_of_a_node_that_leaves_are_removed(worker: str, way: str) -> None:
    nodes = Nodes()
    cluster, node = nodes.cluster, f"n-{worker}"
    record = cluster.known.workers[worker]
    record.member = replace(record.member, node=node)
    if way == "Ray drains it":
        nodes.leave(node)
    else:
        cluster.controller.draining.begin(DrainCommand(node=node, limit_s=30.0), cluster.now)
    nodes.wait(1)
    nodes.drained(worker)
    (operation,) = nodes.operations
    assert operation.state is OperationState.SUCCEEDED, operation
    assert operation.message.endswith("is drained, and the cluster continues without its place")
    assert operation.result["workers"] == [worker]
    assert worker not in cluster.known.places.names()
    assert cluster.state == "SERVING"
    nodes.wait(30)  # the node may be there for a while
    del nodes.of[node]
    nodes.wait(600)
    assert len(nodes.operations) == 1
    assert cluster.started() == []
    nodes.register(f"{node}-again", role="attention" if "attention" in worker else "expert")
    nodes.wait(SETTLE_S + 2)
    assert cluster.started() == [f"{worker}.2"]
    nodes.bring_up(f"{worker}.2", f"{node}-again")
    assert cluster.state == "SERVING"


def test_without_the_option_a_node_that_leaves_is_waited_for() -> None:
    cluster = FakeCluster(2, 2, num_redundant=4)
    cluster.serve()
    node = FollowedNode(node_id="n", address="n", role="expert", room=1)
    for _ in range(60):
        cluster.beat_all()
        cluster.tick(0.5)
        cluster.controller.following.observe([node], cluster.now)
    assert list(cluster.known.operations.kept) == []
    cluster.controller.draining.requested("expert-1", cluster.now, node_leaves=True)
    cluster.tick(1)
    assert cluster.known.drain is not None
    assert not cluster.known.drain.removes_places


def test_a_signal_to_one_worker_alone_keeps_its_place() -> None:
    nodes = Nodes()
    nodes.cluster.controller.draining.requested("expert-1", nodes.cluster.now)
    nodes.wait(LATE_S)
    nodes.drained("expert-1")
    nodes.wait(1)
    assert nodes.cluster.started() == ["expert-1.2"]


def test_a_node_announced_late_still_removes_the_place() -> None:
    """The processes of a node get the signal first, then Ray announces the drain."""
    nodes = Nodes()
    nodes.cluster.controller.draining.requested("expert-1", nodes.cluster.now)
    nodes.wait(1)
    nodes.leave("n-expert-1")
    nodes.drained("expert-1")
    assert "expert-1" not in nodes.cluster.known.places.names()


def test_a_node_that_dies_keeps_its_place_for_another_one() -> None:
    nodes = Nodes()
    cluster = nodes.cluster
    del nodes.of["n-expert-1"]
    cluster.disconnect("expert-1")
    cluster.join_all()
    nodes.wait(60)
    assert cluster.state == "DEGRADED"
    nodes.register("n-another")
    nodes.wait(SETTLE_S + 2)
    (newest,) = {m for m in cluster.started() if m.startswith("expert-1")}
    nodes.bring_up(newest, "n-another")
    assert nodes.operations == []
    assert cluster.state == "SERVING"


def test_a_client_s_order_holds_until_other_nodes_register() -> None:
    nodes = Nodes(num_experts=3)
    cluster = nodes.cluster
    order = from_plain({"expert": 2, "limit_s": 30.0}, ScaleCommand)
    operation = cluster.controller.scaling.begin(order, cluster.now)
    nodes.wait(1)
    nodes.drained("expert-2")
    assert operation.state is OperationState.SUCCEEDED
    nodes.wait(600)
    assert len(nodes.operations) == 1
    nodes.register("n-new")
    nodes.wait(SETTLE_S + 2)
    assert nodes.operations[-1].target.startswith("2 attention and 3 expert workers")


def test_a_node_for_an_order_that_waits_is_not_counted_twice() -> None:
    nodes = Nodes()
    cluster = nodes.cluster
    order = from_plain({"expert": 3, "limit_s": 300.0}, ScaleCommand)
    operation = cluster.controller.scaling.begin(order, cluster.now)
    nodes.wait(60)
    nodes.register("n-new")  # Ray's autoscaler has added it
    nodes.wait(SETTLE_S + 5)
    nodes.bring_up("expert-2", "n-new")
    assert operation.state is OperationState.SUCCEEDED
    nodes.wait(600)
    assert nodes.operations == [operation]


def test_an_order_that_fails_is_tried_again_after_a_pause() -> None:
    nodes = Nodes()
    nodes.register("n-new")
    nodes.wait(SETTLE_S + 2)
    nodes.cluster.controller.lost({"expert-2": "killed"}, nodes.cluster.now)
    nodes.wait(1)
    assert [o.state for o in nodes.operations] == [OperationState.FAILED]
    nodes.wait(RETRY_S - 2)
    assert len(nodes.operations) == 1
    nodes.wait(3)
    assert len(nodes.operations) == 2
    nodes.bring_up("expert-2.2", "n-new")
    assert nodes.operations[-1].state is OperationState.SUCCEEDED


def test_a_node_that_leaves_before_its_worker_serves_takes_the_order_back() -> None:
    nodes = Nodes()
    nodes.register("n-new")
    nodes.wait(SETTLE_S + 2)
    nodes.leave("n-new")
    nodes.wait(1)
    (operation,) = nodes.operations
    assert operation.state is OperationState.CANCELLED
    del nodes.of["n-new"]
    nodes.wait(RETRY_S + SETTLE_S)
    assert nodes.operations == [operation]
    assert nodes.cluster.state == "SERVING"


def test_an_order_that_a_client_cancels_is_not_given_again() -> None:
    nodes = Nodes()
    nodes.register("n-new")
    nodes.wait(SETTLE_S + 2)
    (operation,) = nodes.operations
    nodes.cluster.controller.commands.cancel(operation.id, nodes.cluster.now)
    nodes.wait(600)
    assert operation.state is OperationState.CANCELLED
    assert nodes.operations == [operation]


def test_nothing_begins_while_another_operation_runs() -> None:
    nodes = Nodes()
    nodes.cluster.controller.draining.requested("expert-1", nodes.cluster.now)
    nodes.wait(LATE_S + 1)
    nodes.register("n-new")
    nodes.wait(SETTLE_S + 5)
    assert [o.kind for o in nodes.operations] == ["drain"]


def _world_that_follows() -> tuple[World, dict[str, FollowedNode], Callable[[float], None]]:
    """A cluster on nodes with room for one worker each, the nodes, and what passes time."""
    world = World(2, 2, 4, FOLLOWING)
    nodes = {
        name: FollowedNode(
            node_id=name,
            address=name,
            role=world.workers[name].member.role,
            room=1,
            workers=(name,),
        )
        for name in world.workers
    }

    def wait(seconds: float) -> None:
        for _ in range(round(seconds / 0.5)):
            world.beat()
            world.tick(0.5)
            running(world).following.observe(list(nodes.values()), world.now)
            world.carry_out()
            take_all(world)

    wait(SETTLE_S + 2)
    return world, nodes, wait


def test_the_next_controller_knows_the_nodes_and_goes_on() -> None:
    world, nodes, wait = _world_that_follows()
    nodes["new"] = FollowedNode(node_id="new", address="new", role="expert", room=1)
    wait(SETTLE_S + 2)
    restart(world)
    found = running(world).cluster
    assert found.known_nodes == nodes.keys() - {"new"}
    assert found.scale is not None
    assert found.scale.command.cause == "node new registered"
    wait(1)
    assert [o.is_running for o in found.operations.kept] == [True]
    world.come_up("expert-2.2")
    nodes["new"] = dataclasses.replace(nodes["new"], workers=("expert-2.2",))
    wait(SETTLE_S + 2)
    assert [o.state for o in found.operations.kept] == [OperationState.SUCCEEDED]
    found = running(world).cluster
    assert found.known_nodes == nodes.keys()


def test_the_next_controller_takes_an_order_back_whose_node_leaves() -> None:
    world, nodes, wait = _world_that_follows()
    nodes["new"] = FollowedNode(node_id="new", address="new", role="expert", room=1)
    wait(SETTLE_S + 2)
    restart(world)
    wait(1)
    del nodes["new"]
    wait(1)
    (operation,) = running(world).cluster.operations.kept
    assert operation.state is OperationState.CANCELLED


def test_a_node_that_registers_while_a_client_s_scaling_fails_is_used() -> None:
    nodes = Nodes()
    cluster = nodes.cluster
    order = from_plain({"expert": 3, "limit_s": 300.0}, ScaleCommand)
    failed = cluster.controller.scaling.begin(order, cluster.now)
    nodes.wait(1)
    nodes.register("n-new")
    nodes.wait(1)
    cluster.controller.lost({"expert-2": "killed"}, cluster.now)
    nodes.wait(SETTLE_S + 5)
    assert failed.state is OperationState.FAILED
    assert nodes.operations[-1].target.endswith("3 expert workers (node n-new registered)")
