"""Drains, as the controller sees them: a clock that is moved by hand, workers that are records."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from cluster.controller.drain_operation import DrainCommand
from cluster.controller.drain_requests import GATHER_S
from cluster.controller.draining import SIGNAL_LIMIT_S
from cluster.controller.operations import Operation, OperationState
from cluster.core.codec import from_plain
from cluster.core.errors import ConflictError, RequestError, UnknownNameError
from cluster.core.frames import (
    DrainRequest,
    EpochReady,
    EpochSwitched,
    ExpertsLoaded,
    LoadExperts,
    NewEpoch,
    NewGeneration,
    Shutdown,
    StatusReply,
    StatusRequest,
    SwitchEpoch,
)
from cluster.core.topology import Generation
from tests.cluster.controller.fakes_cluster import FakeCluster
from tests.harness.metric_values import metric


def serving(num_attention: int = 2, num_experts: int = 3, num_redundant: int = 4) -> FakeCluster:
    cluster = FakeCluster(num_attention, num_experts, num_redundant=num_redundant)
    cluster.serve()
    return cluster


def drain(cluster: FakeCluster, worker: str, **order: Any) -> Operation:
    order = {"worker": worker, "limit_s": 5.0, **order}
    return cluster.controller.draining.begin(from_plain(order, DrainCommand), cluster.now)


def pass_time(cluster: FakeCluster, seconds: float) -> None:
    """Time passes, and all workers beat."""
    for _ in range(round(seconds / 0.5)):
        cluster.beat_all()
        cluster.tick(0.5)


def say_requests(cluster: FakeCluster, worker: str, running: float) -> None:
    """It answers the question that a drain asks at every tick."""
    cluster.tick(0.1)
    stats = {"num_requests_running": running, "num_requests_waiting": 0.0}
    asked = cluster.link.last(worker, StatusRequest)
    cluster.send(worker, StatusReply(token=asked.token if asked else 0, stats=stats))


def state_of(cluster: FakeCluster, worker: str) -> str:
    entries = {w["name"]: w for w in cluster.controller.snapshot()["workers"]}
    return str(entries[worker]["state"])


def newest(cluster: FakeCluster, worker: str) -> Generation:
    order = cluster.link.last(worker, NewGeneration)
    assert order is not None
    return order.generation


def on_gpus(cluster: FakeCluster) -> FakeCluster:
    """Expert banks cannot grow."""
    cluster.known.room = cluster.known.num_slots
    return cluster


def load_all(cluster: FakeCluster, error: str = "") -> int:
    """All workers have loaded as ordered; the number of experts."""
    num = 0
    for member in cluster.known.generation.members:
        order = cluster.link.last(member.name, LoadExperts)
        if order is not None:
            num += len(order.experts)
            cluster.send(member.name, ExpertsLoaded(order=order.order, error=error))
    return num


def switch(cluster: FakeCluster) -> dict[str, Any]:
    """All workers learn the newest epoch, and the leader switches; its frame."""
    leader = cluster.known.generation.leader.name
    frame = cluster.link.last(leader, NewEpoch)
    assert frame is not None
    for member in cluster.known.generation.members:
        cluster.send(member.name, EpochReady(generation=frame.generation, epoch=frame.epoch))
    order = cluster.link.last(leader, SwitchEpoch)
    assert order is not None
    assert order.epoch == frame.epoch
    cluster.send(leader, EpochSwitched(generation=frame.generation, epoch=frame.epoch, step=9))
    return {"epoch": frame.epoch, "banks": dict(frame.banks)}


def test_only_copies_are_read_by_others_before_their_worker_leaves() -> None:
    cluster = serving(2, 3, 0)
    operation = drain(cluster, "expert-2")
    assert operation.phase == "copy experts to other workers"
    order = cluster.link.last("expert-0", LoadExperts)
    assert order is not None
    assert order.source["peer"] == "expert-2"
    assert load_all(cluster) == 4  # 2 of 8 experts in 2 layers
    switched = switch(cluster)
    assert set(switched["banks"][0].physical_to_logical[2]) == {-1}
    assert cluster.known.placement.epoch == switched["epoch"] == 2
    cluster.tick(0.1)
    assert {m.name for m in newest(cluster, "expert-0").members} == {
        "attention-0",
        "attention-1",
        "expert-0",
        "expert-1",
    }
    cluster.join_all()
    cluster.tick(0.1)
    cluster.controller.draining.ended(["expert-2"], cluster.now)
    assert operation.state is OperationState.SUCCEEDED
    assert operation.result["experts_copied"] == 4
    snapshot = cluster.controller.snapshot()
    assert metric(snapshot, "migration_slots_moved_total", reason="drain") == 4
    assert metric(snapshot, "migration_seconds_count", reason="drain") == 1


def test_a_loss_while_experts_are_copied_lets_the_drain_begin_again() -> None:
    cluster = serving(2, 4, 0)
    operation = drain(cluster, "expert-3")
    cluster.controller.lost({"attention-1": "killed"}, cluster.now)
    cluster.tick(0.1)
    assert operation.phase == "wait for a running generation"
    cluster.join_all()
    cluster.tick(0.1)
    assert operation.phase == "copy experts to other workers"
    load_all(cluster)
    switch(cluster)
    cluster.tick(0.1)
    assert cluster.state == "RECOVERING"
    cluster.join_all()
    cluster.tick(0.1)
    assert operation.phase == "end the processes"


def test_experts_that_cannot_be_copied_fail_the_drain() -> None:
    cluster = serving(2, 3, 0)
    operation = drain(cluster, "expert-2")
    load_all(cluster, "connection refused")
    load_all(cluster, "no such file")  # from the checkpoint this time
    cluster.tick(0.1)
    assert operation.state is OperationState.FAILED
    assert "could not be copied" in operation.message
    assert "no such file" in operation.message
    assert cluster.known.placement.epoch == 1
    assert state_of(cluster, "expert-2") == "SERVING"


def test_a_drain_that_is_given_up_brings_the_maps_back() -> None:
    cluster = serving(2, 3, 0)
    before = cluster.known.placement.banks
    names = ("attention-1", "expert-2")
    for name in names:
        record = cluster.known.workers[name]
        record.member = replace(record.member, node="host-b")
    say_requests(cluster, "attention-1", 2)
    operation = drain(cluster, "", node="host-b", limit_s=2.0)
    load_all(cluster)
    switch(cluster)
    cluster.tick(0.1)
    assert operation.phase == "move requests to other workers"
    say_requests(cluster, "attention-1", 2)
    pass_time(cluster, 2.5)
    assert operation.phase == "roll it back"
    with pytest.raises(ConflictError, match="already being rolled back"):
        cluster.controller.draining.cancel(operation, cluster.now)
    switch(cluster)
    assert operation.state is OperationState.FAILED
    assert cluster.known.placement.banks == before
    assert [state_of(cluster, name) for name in names] == ["SERVING", "SERVING"]


def test_after_another_generation_what_was_freed_is_loaded_again() -> None:
    """A generation that runs frees what its maps do not name."""
    cluster = serving(3, 3, 0)
    before = cluster.known.placement.banks
    for name in ("attention-1", "expert-2"):
        record = cluster.known.workers[name]
        record.member = replace(record.member, node="host-b")
    operation = drain(cluster, "", node="host-b", limit_s=60.0)
    load_all(cluster)
    switch(cluster)
    cluster.controller.lost({"attention-2": "killed"}, cluster.now)
    cluster.join_all()
    cluster.controller.draining.cancel(operation, cluster.now)
    assert operation.phase == "roll it back"
    assert cluster.answer_loads("expert-2") == 4  # 2 experts in 2 layers
    switch(cluster)
    assert operation.state is OperationState.CANCELLED
    assert cluster.known.placement.banks == before


def test_maps_that_name_a_worker_that_has_gone_are_not_brought_back() -> None:
    cluster = serving(3, 4, 0)
    for name in ("attention-1", "expert-2"):
        record = cluster.known.workers[name]
        record.member = replace(record.member, node="host-b")
    operation = drain(cluster, "", node="host-b", limit_s=60.0)
    load_all(cluster)
    switch(cluster)
    assert operation.phase == "move requests to other workers"
    cluster.controller.lost({"expert-0": "killed"}, cluster.now)
    for member in cluster.known.generation.members:
        cluster.answer_loads(member.name)
    cluster.join_all()
    cluster.controller.draining.cancel(operation, cluster.now)
    assert operation.state is OperationState.CANCELLED
    for bank in cluster.known.placement.banks:
        assert set(bank.physical_to_logical[0]) == {-1}


def test_an_attention_worker_leaves_when_its_requests_have() -> None:
    cluster = serving()
    say_requests(cluster, "attention-1", 3)
    operation = drain(cluster, "attention-1")
    assert state_of(cluster, "attention-1") == "DRAINING"
    cluster.tick(0.1)
    assert cluster.link.last("attention-1", StatusRequest) is not None
    say_requests(cluster, "attention-1", 1)
    cluster.tick(0.1)
    assert (cluster.state, operation.phase) == ("SERVING", "move requests to other workers")
    say_requests(cluster, "attention-1", 0)
    cluster.tick(0.1)
    assert cluster.state == "RECOVERING"
    assert state_of(cluster, "attention-1") == "DRAINED"
    names = {m.name for m in newest(cluster, "attention-0").members}
    assert names == {"attention-0", "expert-0", "expert-1", "expert-2"}
    assert newest(cluster, "attention-1").number == 1
    order = cluster.link.last("attention-0", NewGeneration)
    assert order is not None
    assert order.drained == ["attention-1"]
    cluster.join_all()
    cluster.tick(0.1)
    assert cluster.link.ended == ["attention-1"]
    assert cluster.link.last("attention-1", Shutdown) is not None
    assert operation.is_running
    cluster.controller.draining.ended(["attention-1"], cluster.now)
    assert operation.state is OperationState.SUCCEEDED
    assert operation.result == {"requests_moved": 3, "workers": ["attention-1"]}
    assert (operation.generation, operation.progress) == (2, 1.0)
    cause, effect = (cluster.controller.snapshot()["history"][-1][k] for k in ("cause", "effect"))
    assert cause == f"drained attention-1 ({operation.id})"
    assert effect.startswith("continue with 1 attention and 3 expert workers")
    left = next(w for w in cluster.controller.snapshot()["workers"] if w["name"] == "attention-1")
    assert left["reason"] == cause
    cluster.tick(0.1)
    assert state_of(cluster, "attention-1.2") == "STARTING"
    cluster.bring_up("attention-1.2")
    cluster.join_all()
    history = cluster.controller.snapshot()["history"]
    assert history[-1]["cause"] == f"attention-1.2 is ready ({operation.id})"


def test_numbers_from_before_the_drain_do_not_count() -> None:
    """Nor do those of a heartbeat that was under way when it began."""
    cluster = serving()
    say_requests(cluster, "attention-1", 0)
    drain(cluster, "attention-1")
    cluster.tick(0.1)
    assert cluster.state == "SERVING"
    late = StatusReply(token=0, stats={"num_requests_running": 0.0, "num_requests_waiting": 0.0})
    cluster.send("attention-1", late)
    cluster.tick(0.1)
    assert cluster.state == "SERVING"
    say_requests(cluster, "attention-1", 0)
    cluster.tick(0.1)
    assert state_of(cluster, "attention-1") == "DRAINED"


def test_an_expert_worker_leaves_its_work_to_the_copies() -> None:
    cluster = serving()
    operation = drain(cluster, "expert-1")
    cluster.tick(0.1)
    order = cluster.link.last("expert-0", NewGeneration)
    assert order is not None
    assert order.placement.epoch == 2
    for bank in order.placement.banks:
        assert set(bank.physical_to_logical[1]) == {-1}
        assert 1 not in bank.decode_device
    cluster.join_all()
    cluster.tick(0.1)
    cluster.controller.draining.ended(["expert-1"], cluster.now)
    assert operation.state is OperationState.SUCCEEDED
    assert cluster.state == "DEGRADED"
    assert cluster.controller.snapshot()["experts_complete"]


def test_the_late_closing_of_a_drained_worker_is_no_loss() -> None:
    cluster = serving()
    drain(cluster, "expert-1")
    cluster.tick(0.1)
    cluster.disconnect("expert-1", "closed by the peer")
    cluster.join_all()
    assert cluster.known.generation.number == 2
    assert cluster.state == "DEGRADED"


def test_a_whole_node_leaves_at_once() -> None:
    cluster = serving(2, 4)
    for name in ("attention-1", "expert-3"):
        record = cluster.known.workers[name]
        record.member = replace(record.member, node="host-b")
    operation = drain(cluster, "", node="host-b")
    say_requests(cluster, "attention-1", 0)
    cluster.tick(0.1)
    assert len(newest(cluster, "attention-0").members) == 4
    assert operation.target == "attention-1 and expert-3"
    cluster.join_all()
    cluster.tick(0.1)
    cluster.controller.draining.ended(["attention-1", "expert-3"], cluster.now)
    assert operation.state is OperationState.SUCCEEDED
    cluster.known.nodes_alive({"host-a": frozenset("a"), "host-b": frozenset("b")}, cluster.now)
    cluster.tick(1.0)
    assert "attention-1.2" not in cluster.known.workers
    cluster.known.nodes_alive({"host-a": frozenset("a")}, cluster.now)
    cluster.tick(1.0)
    assert state_of(cluster, "attention-1.2") == "STARTING"


@pytest.mark.parametrize(
    ("cluster", "worker", "words"),
    [
        (lambda: serving(1, 3), "attention-0", "attention-0 is the last attention worker"),
        (
            lambda: on_gpus(serving(2, 3, 0)),
            "expert-2",
            "have no free slots for 4 experts that only",
        ),
        (lambda: FakeCluster(2, 3), "expert-2", "the cluster is starting or ending"),
    ],
    ids=["last attention", "only copies", "starting"],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    cluster: Any, worker: str, words: str
) -> None:
    made = cluster()
    before = made.controller.snapshot()
    with pytest.raises(ConflictError, match=words):
        drain(made, worker)
    assert made.controller.snapshot() == before
    assert made.controller.cluster.operations.to_list() == []


def test_unknown_names_and_orders_are_refused() -> None:
    cluster = serving()
    with pytest.raises(UnknownNameError, match="no worker 'expert-9'"):
        drain(cluster, "expert-9")
    with pytest.raises(UnknownNameError, match="node 'mars'"):
        drain(cluster, "", node="mars")
    for order in ({"worker": "expert-1"}, {"limit_s": 1.0, "wait": 1}, {"limit_s": "1"}):
        with pytest.raises(RequestError, match="not a DrainCommand"):
            from_plain(order, DrainCommand, RequestError)
    with pytest.raises(ConflictError, match="epoch 1 is in force, not 7"):
        drain(cluster, "expert-1", expected_epoch=7)


def test_one_at_a_time_and_the_same_request_once() -> None:
    cluster = serving()
    first = drain(cluster, "attention-1", request_id="a")
    assert drain(cluster, "attention-1", request_id="a") is first
    for name, force in (("expert-1", False), ("attention-1", True)):
        with pytest.raises(ConflictError, match=r"drain-1\.1 .* a different operation"):
            drain(cluster, name, request_id="a", force=force)
    with pytest.raises(ConflictError, match=r"drain-1\.1 \(drain of attention-1\) is under way"):
        drain(cluster, "expert-1", request_id="b")


def test_past_its_limit_a_drain_is_undone() -> None:
    cluster = serving()
    operation = drain(cluster, "attention-1", limit_s=1.0)
    say_requests(cluster, "attention-1", 2)
    pass_time(cluster, 2.0)
    assert operation.state is OperationState.FAILED
    assert operation.message == "could not move requests to other workers within 1 s"
    assert state_of(cluster, "attention-1") == "SERVING"
    assert cluster.state == "SERVING"
    assert drain(cluster, "expert-1").is_running


def test_past_its_limit_a_forced_drain_goes_on() -> None:
    cluster = serving()
    operation = drain(cluster, "attention-1", limit_s=1.0, force=True)
    say_requests(cluster, "attention-1", 2)
    pass_time(cluster, 2.0)
    assert cluster.state == "RECOVERING"
    assert operation.is_running


def test_a_drain_can_be_cancelled_until_the_worker_has_left() -> None:
    cluster = serving()
    operation = drain(cluster, "attention-1")
    cluster.controller.draining.cancel(operation, cluster.now)
    assert operation.state is OperationState.CANCELLED
    assert state_of(cluster, "attention-1") == "SERVING"
    with pytest.raises(ConflictError, match="has ended"):
        cluster.controller.draining.cancel(operation, cluster.now)
    late = drain(cluster, "expert-1")
    cluster.tick(0.1)
    with pytest.raises(ConflictError, match="has already left"):
        cluster.controller.draining.cancel(late, cluster.now)


@pytest.mark.parametrize("is_too_late", [True, False])
def test_a_drain_whose_workers_switch_epochs_goes_on(is_too_late: bool) -> None:
    """Otherwise they run an epoch that the controller does not know, and must form again."""
    cluster = serving(2, 3, 0)
    operation = drain(cluster, "expert-2")
    load_all(cluster)
    leader = cluster.known.generation.leader.name
    frame = cluster.link.last(leader, NewEpoch)
    assert frame is not None
    for member in cluster.known.generation.members:
        cluster.send(member.name, EpochReady(generation=frame.generation, epoch=frame.epoch))
    if is_too_late:
        pass_time(cluster, 6.0)
    else:
        with pytest.raises(ConflictError, match="is switching epochs: try again"):
            cluster.controller.draining.cancel(operation, cluster.now)
    assert operation.is_running
    cluster.send(leader, EpochSwitched(generation=frame.generation, epoch=frame.epoch, step=9))
    assert cluster.known.placement.epoch == frame.epoch


def test_a_drain_that_cannot_switch_any_more_ends() -> None:
    cluster = serving(1, 3, 0)
    operation = drain(cluster, "expert-2")
    load_all(cluster)
    frame = cluster.link.last("attention-0", NewEpoch)
    assert frame is not None
    for member in cluster.known.generation.members:
        cluster.send(member.name, EpochReady(generation=frame.generation, epoch=frame.epoch))
    cluster.controller.lost({"attention-0": "killed"}, cluster.now)  # the leader, and the last one
    pass_time(cluster, 6.0)
    assert operation.state is OperationState.FAILED


def test_a_worker_that_dies_first_ends_its_drain() -> None:
    cluster = serving()
    operation = drain(cluster, "attention-1")
    cluster.controller.lost({"attention-1": "killed"}, cluster.now)
    assert operation.state is OperationState.FAILED
    assert operation.message == "attention-1 was lost before it had left: killed"
    assert state_of(cluster, "attention-1") == "LOST"


def test_the_loss_of_the_others_keeps_the_worker() -> None:
    cluster = serving()
    operation = drain(cluster, "attention-1")
    cluster.controller.lost({"attention-0": "killed"}, cluster.now)
    cluster.join_all()
    say_requests(cluster, "attention-1", 0)
    cluster.tick(0.1)
    assert operation.state is OperationState.FAILED
    assert "attention-1 is the last attention worker" in operation.message
    assert state_of(cluster, "attention-1") == "SERVING"


def test_workers_that_got_a_signal_are_drained_together_then_others() -> None:
    cluster = serving(2, 4)
    cluster.send("expert-3", DrainRequest())
    cluster.tick(GATHER_S / 2)
    cluster.send("attention-1", DrainRequest())
    cluster.send("attention-1", DrainRequest())
    cluster.tick(GATHER_S)
    (operation,) = cluster.controller.cluster.operations.to_list()
    assert operation["target"] == "attention-1 and expert-3"
    cluster.send("attention-1", DrainRequest())
    say_requests(cluster, "attention-1", 0)
    cluster.tick(0.1)
    cluster.join_all()
    cluster.tick(0.1)
    cluster.controller.draining.ended(["attention-1", "expert-3"], cluster.now)
    assert len(cluster.controller.cluster.operations.to_list()) == 1
    cluster.send("expert-2", DrainRequest())
    cluster.tick(2 * GATHER_S)
    assert len(cluster.controller.cluster.operations.to_list()) == 2
    assert SIGNAL_LIMIT_S > GATHER_S


def test_a_signal_that_cannot_be_followed_is_noted() -> None:
    cluster = serving(1, 3)
    cluster.send("attention-0", DrainRequest())
    cluster.tick(2 * GATHER_S)
    entry = cluster.controller.snapshot()["history"][-1]
    assert entry["cause"] == "attention-0 got a signal to end"
    assert "last attention worker" in entry["effect"]
    assert state_of(cluster, "attention-0") == "SERVING"


def test_a_drain_of_a_node_is_tried_again_after_a_refusal() -> None:
    cluster = serving(2, 4)
    cluster.controller.lost({"attention-0": "closed"}, cluster.now)
    cluster.join_all()
    for _ in range(12):  # the node's end is announced again and again
        cluster.controller.draining.requested("attention-1", cluster.now)
        cluster.tick(0.5)
        cluster.beat_all()
    assert cluster.controller.cluster.operations.to_list() == []
    causes = [e["cause"] for e in cluster.controller.snapshot()["history"]]
    assert causes.count("attention-1 got a signal to end") == 1
    cluster.bring_up("attention-0.2")
    cluster.join_all()
    for _ in range(12):
        cluster.controller.draining.requested("attention-1", cluster.now)
        cluster.tick(0.5)
        cluster.beat_all()
    (operation,) = cluster.controller.cluster.operations.to_list()
    assert operation["target"] == "attention-1"


def test_the_end_of_the_cluster_ends_a_drain() -> None:
    cluster = serving()
    operation = drain(cluster, "attention-1")
    cluster.controller.stop(cluster.now)
    cluster.tick(0.1)
    assert operation.state is OperationState.FAILED
    assert operation.message == "the cluster is ending"


def test_a_worker_that_loads_does_not_hold_up_the_others_of_its_node() -> None:
    cluster = serving(3, 3)
    cluster.controller.lost({"attention-2": "closed"}, cluster.now)
    cluster.join_all()
    cluster.tick(0.5)
    (newest,) = cluster.started()
    assert newest == "attention-2.2"
    for name in ("attention-1", newest):
        cluster.controller.draining.requested(name, cluster.now, node_leaves=True)
    for _ in range(2):
        cluster.beat_all(newest)
        cluster.tick(0.5)
    (operation,) = cluster.controller.cluster.operations.to_list()
    assert operation["target"] == "attention-1"
