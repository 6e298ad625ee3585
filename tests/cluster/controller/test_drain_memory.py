"""The controller dies during a drain: the next one goes on with it."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from cluster.controller.controller import Controller
from cluster.controller.drain_operation import Drain, DrainCommand, DrainStep
from cluster.controller.operations import Operation, Operations, OperationState
from cluster.controller.rebalance_job import RebalanceCommand
from cluster.core.codec import from_plain, to_plain
from cluster.core.errors import ConflictError
from cluster.core.frames import ControlFrame, DrainRequest
from cluster.core.placement import contiguous
from tests.cluster.controller.controller_world import World
from tests.cluster.controller.fakes_cluster import BANKS

NUM_SPARE = 16
"""Every expert has copies on three workers."""


def begin(world: World, worker: str, **order: object) -> str:
    """Order a drain; its id."""
    wanted = from_plain({"worker": worker, "limit_s": 60.0, **order}, DrainCommand)
    return running(world).draining.begin(wanted, world.now).id


def running(world: World) -> Controller:
    """The controller that there is."""
    assert world.controller is not None
    return world.controller


def restart(world: World, *said: ControlFrame, num_unsent: int = 0) -> None:
    """The controller dies and comes back; all that live call it, the last one with more to say."""
    world.crash_controller(num_unsent)
    world.restart_controller()
    name = ""
    for name, model in world.workers.items():
        if world.awaits(model):
            world.greet(name)
    for frame in said:
        assert world.collector is not None
        world.collector.frame(name, frame, world.now)
    world.tick(0.1)


def take_all(world: World) -> None:
    """All workers handle what has reached them, and time passes."""
    for _ in range(3):
        world.take_all(*world.workers)
        world.tick(0.1)


def state_of(world: World, worker: str) -> str:
    entries = {w["name"]: w for w in running(world).snapshot()["workers"]}
    return str(entries[worker]["state"])


def test_a_drain_goes_on_under_the_next_controller() -> None:
    world = World(2, 3, NUM_SPARE)
    operation_id = begin(world, "attention-1", request_id="mine")
    restart(world)
    assert running(world).snapshot()["term"] == 2
    assert state_of(world, "attention-1") == "DRAINING"
    assert begin(world, "attention-1", request_id="mine") == operation_id
    operation = running(world).cluster.operations.find(operation_id)
    assert operation.is_running
    take_all(world)
    assert state_of(world, "attention-1") == "DRAINED"
    assert {m.name for m in running(world).cluster.generation.members} == {
        "attention-0",
        "expert-0",
        "expert-1",
        "expert-2",
    }
    world.reap()
    assert operation.state is OperationState.SUCCEEDED
    world.tick(0.1)
    assert state_of(world, "attention-1.2") == "STARTING"


def test_a_worker_that_had_left_is_ended_and_its_place_filled_again() -> None:
    for num_unsent in (0, 9):  # the others have, or have not, got the new generation
        world = World(2, 3, NUM_SPARE)
        operation_id = begin(world, "expert-2")
        world.tick(0.1)
        assert state_of(world, "expert-2") == "DRAINED"
        restart(world, num_unsent=num_unsent)
        assert running(world).cluster.operations.find(operation_id).is_running
        take_all(world)
        assert "expert-2" in world.ended
        world.reap()
        operation = running(world).cluster.operations.find(operation_id)
        assert operation.state is OperationState.SUCCEEDED, num_unsent
        world.tick(0.1)
        assert state_of(world, "expert-2.2") == "STARTING"


def test_a_place_that_was_opened_again_is_filled_by_the_next_controller() -> None:
    world = World(2, 3, NUM_SPARE)
    begin(world, "expert-2")
    world.tick(0.1)
    take_all(world)
    world.reap()  # and the controller dies before it has started another one
    assert "expert-2.2" not in world.workers
    restart(world)
    world.tick(0.1)
    assert state_of(world, "expert-2.2") == "STARTING"


def test_the_place_of_a_node_that_is_to_go_stays_empty() -> None:
    world = World(2, 3, NUM_SPARE)
    controller = running(world)
    record = controller.cluster.workers["expert-2"]
    record.member = replace(record.member, node="host-b")
    controller.cluster.nodes_alive({"host-b": frozenset("b")}, world.now)
    order = DrainCommand(node="host-b", limit_s=60.0)
    controller.draining.begin(order, world.now)
    world.tick(0.1)
    take_all(world)
    world.reap()
    restart(world)
    running(world).cluster.nodes_alive({"host-b": frozenset("b")}, world.now)
    world.tick(1.0)
    assert "expert-2.2" not in world.workers
    restart(world)
    running(world).cluster.nodes_alive({"host-b": frozenset("c")}, world.now)  # it was back at once
    world.tick(0.1)
    assert state_of(world, "expert-2.2") == "STARTING"


def test_a_worker_that_died_meanwhile_ends_its_drain() -> None:
    world = World(2, 3, NUM_SPARE)
    operation_id = begin(world, "attention-1")
    world.crash("attention-1")
    restart(world)  # the earlier one had not noticed
    operation = running(world).cluster.operations.find(operation_id)
    assert operation.state is OperationState.FAILED
    assert "lost before" in operation.message
    assert state_of(world, "attention-1") == "LOST"


def test_the_limit_counts_from_when_the_drain_began() -> None:
    world = World(2, 3, NUM_SPARE)
    operation_id = begin(world, "attention-1", limit_s=5.0)
    for _ in range(4):
        world.tick(1.0)
        world.beat()
    running(world).cluster.operations.find(operation_id).started += 3600.0  # another host's clock
    running(world).cluster.send_snapshot()
    restart(world)
    operation = running(world).cluster.operations.find(operation_id)
    assert operation.is_running
    world.tick(1.9)
    assert operation.state is OperationState.FAILED
    assert "within 5 s" in operation.message
    assert state_of(world, "attention-1") == "SERVING"


def test_a_signal_that_came_before_is_followed() -> None:
    world = World(2, 3, NUM_SPARE)
    restart(world, DrainRequest())
    world.tick(0.5)
    (operation,) = running(world).cluster.operations.to_list()
    assert operation["target"] == "expert-2"


def test_an_operation_did_not_end_in_the_future() -> None:
    """The clock of the earlier controller was a day ahead."""
    earlier, later = Operations(1, 86400.0, lambda: None), Operations(2, 0.0, lambda: None)
    order = RebalanceCommand(request_id="a", dry_run=True)
    earlier.end(earlier.begin(order, "", 1.0), OperationState.FAILED, "no", 2.0)
    later.restore(earlier.kept, 3.0)
    operation = later.find("rebalance-1.1")
    assert (operation.started, operation.ended) == (2.0, 3.0)


def test_what_else_was_under_way_has_failed() -> None:
    forgotten = Operations(2, 0.0, lambda: None)
    first = Operations(1, 0.0, lambda: None)
    order = RebalanceCommand(request_id="a", dry_run=True)
    first.begin(order, "placement epoch 4", 10.0)
    forgotten.restore(first.kept, 20.0)
    operation = forgotten.find("rebalance-1.1")
    assert operation.state is OperationState.FAILED
    assert operation.message == "the controller was restarted"
    assert operation.ended == 20.0
    assert forgotten.find_repeated(order, 1) is operation
    with pytest.raises(ConflictError, match="a different operation"):
        forgotten.find_repeated(RebalanceCommand(request_id="a"), 1)
    forgotten.check_free()


def test_a_drain_is_plain_data_and_back() -> None:
    operation = Operation(id="drain-1.1", kind="drain", target="x", request_id="", started=1.0)
    drain = Drain(
        operation=operation,
        names=("expert-1", "attention-1"),
        command=DrainCommand(node="host-b", limit_s=7.0, force=True),
        deadline=8.0,
        left_s=7.0,
        step=DrainStep.BACK,
        before=contiguous(BANKS, 3, 4),
        outcome=(OperationState.CANCELLED, "cancelled"),
    )
    assert from_plain(to_plain(drain), Drain) == drain


def test_a_drain_that_was_being_taken_back_ends_as_it_should() -> None:
    world = World(2, 3, NUM_SPARE)
    operation = running(world).cluster.operations.find(begin(world, "attention-1"))
    known = Drain(
        operation=operation,
        names=("attention-1",),
        command=DrainCommand(worker="attention-1", limit_s=60.0),
        deadline=world.now + 60.0,
        left_s=60.0,
        step=DrainStep.BACK,
        outcome=(OperationState.CANCELLED, "cancelled"),
    )
    running(world).draining.restore(known, world.now)
    world.tick(0.1)
    assert (operation.state, operation.message) == (OperationState.CANCELLED, "cancelled")
    assert state_of(world, "attention-1") == "SERVING"
