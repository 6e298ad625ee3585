"""Scalings, as the controller sees them: a clock moved by hand, and workers that are records."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from msgspec.structs import replace

from cluster.config.workers import WorkersSection
from cluster.controller.operations import Operation, OperationState
from cluster.controller.scale_operation import ScaleCommand
from cluster.core.arithmetic import ArithmeticOffer
from cluster.core.codec import from_plain
from cluster.core.errors import ConflictError, RequestError
from cluster.core.frames import ExpertsLoaded, LoadExperts, NewGeneration, Shutdown
from cluster.core.placement import FREE_SLOT, ExpertPlacement
from cluster.core.release import Build
from tests.cluster.controller.fakes_cluster import CONFIG, FakeCluster
from tests.cluster.controller.test_drain import load_all, say_requests, switch


def serving(num_attention: int = 2, num_experts: int = 3, num_redundant: int = 4) -> FakeCluster:
    cluster = FakeCluster(num_attention, num_experts, num_redundant=num_redundant)
    cluster.serve()
    return cluster


def scale(cluster: FakeCluster, **order: Any) -> Operation:
    wanted = from_plain({"limit_s": 30.0, **order}, ScaleCommand)
    operation = cluster.controller.scaling.begin(wanted, cluster.now)
    pass_time(cluster, 0.5)
    return operation


def pass_time(cluster: FakeCluster, seconds: float) -> None:
    """Time passes, and all workers beat that have called."""
    for _ in range(round(seconds / 0.5)):
        coming = [r.name for r in cluster.known.workers.alive() if r.is_pending]
        cluster.beat_all(*coming)
        cluster.tick(0.5)


def members(cluster: FakeCluster) -> set[str]:
    return {m.name for m in cluster.known.generation.members}


def experts_of(placement: ExpertPlacement, device: int) -> list[int]:
    row = placement.banks[0].physical_to_logical[device]
    return [expert for expert in row if expert != FREE_SLOT]


def test_new_workers_join_together_with_the_experts_that_they_have_loaded() -> None:
    cluster = serving(1, 2, 0)
    operation = scale(cluster, attention=2, expert=3)
    assert cluster.started() == ["attention-1", "expert-2"]
    assert operation.phase == "start workers"
    placement = cluster.link.started[1][1]
    assert experts_of(placement, 2) == [0, 4]
    cluster.bring_up("expert-2")
    pass_time(cluster, 1.0)
    assert members(cluster) == {"attention-0", "expert-0", "expert-1"}
    assert cluster.state == "SERVING"
    cluster.bring_up("attention-1")
    assert members(cluster) == {
        "attention-0",
        "attention-1",
        "expert-0",
        "expert-1",
        "expert-2",
    }
    causes = [entry["cause"] for entry in cluster.controller.snapshot()["history"]]
    assert causes[-1] == f"attention-1, expert-2 are ready ({operation.id})"
    order = cluster.link.last("expert-0", NewGeneration)
    assert order is not None
    assert order.placement.banks == placement.banks
    assert cluster.link.last("expert-0", LoadExperts) is None
    cluster.join_all()
    cluster.tick(0.2)
    assert operation.state is OperationState.SUCCEEDED
    assert operation.message == "scaled to 2 attention and 3 expert workers"
    assert operation.result["added"] == ["attention-1", "expert-2"]
    assert cluster.known.desired.banks == placement.banks
    assert cluster.state == "SERVING"


def test_workers_that_go_are_drained_and_their_places_removed() -> None:
    cluster = serving(2, 3, 0)
    operation = scale(cluster, attention=1, expert=2)
    assert operation.phase == "copy experts to other workers"
    assert load_all(cluster) == 4  # 2 of 8 experts in 2 layers
    switch(cluster)
    pass_time(cluster, 0.5)
    assert operation.phase == "move requests to other workers"
    say_requests(cluster, "attention-1", 0.0)
    cluster.tick(0.1)
    assert members(cluster) == {"attention-0", "expert-0", "expert-1"}
    order = cluster.link.last("expert-0", NewGeneration)
    assert order is not None
    assert order.placement.num_devices == 2
    cluster.join_all()
    cluster.tick(0.1)
    assert cluster.link.last("expert-2", Shutdown) is not None
    cluster.controller.draining.ended(["attention-1", "expert-2"], cluster.now)
    assert operation.state is OperationState.SUCCEEDED
    assert operation.result["removed"] == ["attention-1", "expert-2"]
    assert cluster.known.desired.banks == cluster.known.placement.banks
    pass_time(cluster, 5.0)
    assert cluster.started() == []
    assert cluster.state == "SERVING"


def test_a_place_that_comes_back_has_a_worker_with_another_name() -> None:
    cluster = serving(1, 3, 0)
    scale(cluster, expert=2)
    load_all(cluster)
    switch(cluster)
    pass_time(cluster, 0.5)
    cluster.join_all()
    cluster.tick(0.1)
    cluster.controller.draining.ended(["expert-2"], cluster.now)
    scale(cluster, expert=4)
    assert cluster.started() == ["expert-2.2", "expert-3"]


def test_one_order_can_add_and_remove() -> None:
    cluster = serving(1, 3, 4)
    operation = scale(cluster, attention=2, expert=2)
    assert cluster.started() == ["attention-1"]
    cluster.bring_up("attention-1")
    cluster.join_all()
    pass_time(cluster, 0.5)
    assert operation.phase == "form a generation without"
    cluster.join_all()
    cluster.tick(0.1)
    cluster.controller.draining.ended(["expert-2"], cluster.now)
    assert operation.state is OperationState.SUCCEEDED
    assert operation.result["added"] == ["attention-1"]
    assert operation.result["removed"] == ["expert-2"]


@pytest.mark.parametrize("when", ["before it calls", "while it loads", "when it is ready"])
def test_a_new_worker_that_dies_takes_the_scaling_back(when: str) -> None:
    cluster = serving(1, 2, 0)
    before = cluster.known.desired
    operation = scale(cluster, expert=4)
    if when == "while it loads":
        cluster.register("expert-2")
    elif when == "when it is ready":
        cluster.bring_up("expert-2")
    cluster.controller.lost({"expert-2": "killed"}, cluster.now)
    pass_time(cluster, 0.5)
    assert operation.state is OperationState.FAILED
    assert operation.message == "expert-2 was lost before it served: killed"
    assert set(cluster.link.ended) == {"expert-2", "expert-3"}
    assert cluster.known.desired is before
    assert members(cluster) == {"attention-0", "expert-0", "expert-1"}
    assert cluster.state == "SERVING"
    pass_time(cluster, 60.0)
    assert cluster.started() == ["expert-2", "expert-3"]
    again = scale(cluster, expert=3)
    assert cluster.started()[2:] == ["expert-2.2"]
    cluster.bring_up("expert-2.2")
    cluster.join_all()
    cluster.tick(0.2)
    assert again.state is OperationState.SUCCEEDED


def test_a_worker_of_another_build_takes_the_scaling_back() -> None:
    cluster = serving(1, 2, 0)
    operation = scale(cluster, expert=3)
    cluster.register("expert-2", build=Build(checkpoint_id="another"))
    pass_time(cluster, 0.5)
    assert operation.state is OperationState.FAILED
    assert "checkpoint of" in operation.message
    assert cluster.state == "SERVING"


def test_a_worker_that_computes_otherwise_takes_the_scaling_back() -> None:
    """As on a host with another CPU, where exact results are demanded."""
    cluster = serving(1, 2, 0)
    operation = scale(cluster, expert=3)
    cluster.register("expert-2", offer=ArithmeticOffer(kernels=("another",), is_strict=True))
    pass_time(cluster, 0.5)
    assert operation.state is OperationState.FAILED
    assert "expert-2 computes with another, the others with dot" in operation.message
    assert cluster.state == "SERVING"
    assert members(cluster) == {"attention-0", "expert-0", "expert-1"}
    again = scale(cluster, expert=3)
    cluster.bring_up("expert-2.2")
    cluster.join_all()
    cluster.tick(0.2)
    assert again.state is OperationState.SUCCEEDED


def test_a_new_worker_knows_who_holds_its_experts() -> None:
    cluster = serving(1, 2, 0)
    scale(cluster, expert=3)
    (started,) = cluster.link.holders
    assert [(h.name, h.experts) for h in started] == [
        ("expert-0", ((0,), (0,))),
        ("expert-1", ((4,), (4,))),
    ]


def test_no_room_within_the_limit_takes_the_scaling_back() -> None:
    cluster = serving(1, 2, 0)
    operation = scale(cluster, expert=3, limit_s=20.0)
    pass_time(cluster, 19.0)
    assert operation.is_running
    assert cluster.controller.snapshot()["problems"] == ["expert-2 waits for room"]
    pass_time(cluster, 2.0)
    assert operation.state is OperationState.FAILED
    assert operation.message == "expert-2 could not start workers within 20 s"
    assert cluster.link.ended == ["expert-2"]
    assert cluster.controller.snapshot()["problems"] == []


def test_a_scaling_can_be_cancelled_until_its_workers_serve() -> None:
    cluster = serving(1, 2, 0)
    operation = scale(cluster, expert=3)
    cluster.controller.scaling.cancel(operation, cluster.now)
    pass_time(cluster, 0.5)
    assert operation.state is OperationState.CANCELLED
    assert cluster.link.ended == ["expert-2"]
    effect = cluster.controller.snapshot()["history"][-1]["effect"]
    assert effect == "continue without expert-2"
    with pytest.raises(ConflictError, match="has ended"):
        cluster.controller.scaling.cancel(operation, cluster.now)


def test_a_new_worker_lost_while_it_joins_is_replaced() -> None:
    cluster = serving(1, 2, 0)
    operation = scale(cluster, expert=3)
    cluster.bring_up("expert-2")
    pass_time(cluster, 0.5)
    assert operation.phase == "form a generation with them"
    cluster.disconnect("expert-2")
    assert members(cluster) == {"attention-0", "expert-0", "expert-1"}
    cluster.join_all()
    pass_time(cluster, 2.0)
    assert operation.phase == "start workers"
    assert cluster.started() == ["expert-2", "expert-2.2"]
    cluster.bring_up("expert-2.2")
    cluster.join_all()
    pass_time(cluster, 0.5)
    assert operation.state is OperationState.SUCCEEDED
    assert operation.result["added"] == ["expert-2.2"]


def test_an_old_worker_lost_meanwhile_is_replaced_as_always() -> None:
    cluster = serving(1, 2, 0)
    operation = scale(cluster, expert=3)
    cluster.disconnect("expert-1")
    for order in [f for f in cluster.link.sent["expert-0"] if isinstance(f, LoadExperts)]:
        cluster.send("expert-0", ExpertsLoaded(order=order.order))
    cluster.join_all()
    pass_time(cluster, 0.5)
    assert cluster.started() == ["expert-2", "expert-1.2"]
    assert cluster.state == "DEGRADED"
    cluster.bring_up("expert-2")
    cluster.join_all()
    pass_time(cluster, 0.5)
    assert operation.state is OperationState.SUCCEEDED
    cluster.bring_up("expert-1.2")
    cluster.join_all()
    assert cluster.state == "SERVING"
    assert cluster.known.placement.banks == cluster.known.desired.banks


def test_an_empty_place_goes_first_and_nobody_waits_for_its_worker() -> None:
    cluster = serving(1, 3, 0)
    cluster.disconnect("expert-0")
    cluster.answer_loads("expert-1")
    cluster.answer_loads("expert-2")
    cluster.join_all()
    pass_time(cluster, 0.5)
    assert cluster.started() == ["expert-0.2"]
    assert cluster.state == "DEGRADED"
    operation = scale(cluster, expert=2)
    assert operation.state is OperationState.SUCCEEDED
    assert cluster.link.ended[-1] == "expert-0.2"
    assert cluster.state == "SERVING"
    assert members(cluster) == {"attention-0", "expert-1", "expert-2"}


@pytest.mark.parametrize(
    ("order", "error", "text"),
    [
        ({}, RequestError, "one of attention, expert, prefill and decode is required"),
        ({"attention": 0}, RequestError, r"attention \(0\) must be at least 1"),
        ({"expert": -1}, RequestError, r"expert \(-1\) must be at least 1"),
        ({"expert": 9}, RequestError, r"expert \(9\) must not exceed the 8 experts of a bank"),
    ],
)
def test_orders_that_cannot_be(order: dict[str, Any], error: type[Exception], text: str) -> None:
    cluster = serving()
    with pytest.raises(error, match=text):
        scale(cluster, **order)
    assert cluster.known.operations.running is None


def test_workers_without_room_for_the_experts_stay() -> None:
    cluster = serving(1, 2, 0)
    cluster.known.room = cluster.known.num_slots  # as on GPUs, where banks cannot grow
    with pytest.raises(ConflictError, match="no free slots for 8 experts that only they hold"):
        scale(cluster, expert=1)


def test_one_operation_at_a_time() -> None:
    cluster = serving()
    operation = scale(cluster, expert=4, request_id="mine")
    with pytest.raises(ConflictError, match="is under way"):
        scale(cluster, expert=5)
    assert scale(cluster, expert=4, request_id="mine") is operation


def test_the_spare_copies_of_a_new_worker_keep_their_shares() -> None:
    cluster = serving(1, 2, 2)
    scale(cluster, expert=3)
    placement = cluster.link.started[0][1]
    for bank in placement.banks:
        for expert, device in enumerate(bank.decode_device):
            assert expert in bank.physical_to_logical[device]
    assert replace(placement, epoch=7).num_devices == 3


def test_one_that_is_cancelled_at_the_last_moment_drains_nobody() -> None:
    cluster = serving(2, 2, 0)
    operation = scale(cluster, attention=1, expert=3)
    cluster.bring_up("expert-2")
    pass_time(cluster, 0.5)
    assert operation.phase == "form a generation with them"
    cluster.controller.scaling.cancel(operation, cluster.now)
    cluster.join_all()
    pass_time(cluster, 0.5)
    assert operation.state is OperationState.CANCELLED
    assert cluster.known.drain is None
    assert members(cluster) >= {"attention-0", "attention-1", "expert-2"}


def with_groups(num_attention: int, num_prefill: int, **workers: Any) -> FakeCluster:
    """The first workers compute prompts, the others decode."""
    section = WorkersSection(
        num_prefill_workers=num_prefill,
        num_decode_workers=num_attention - num_prefill,
        **workers,
    )
    config = dataclasses.replace(CONFIG, workers=section)
    cluster = FakeCluster(num_attention, 2, config=config)
    cluster.serve()
    return cluster


def groups(cluster: FakeCluster) -> dict[str, str]:
    """Of the attention workers in the newest generation."""
    return {m.name: m.group for m in cluster.known.generation.attention}


def test_workers_change_their_step_groups_in_a_new_generation() -> None:
    cluster = with_groups(3, 1)
    before = cluster.known.generation.number
    assert [*groups(cluster).values()] == ["prefill", "decode", "decode"]
    operation = scale(cluster, prefill=2, decode=1)
    assert cluster.started() == []
    assert cluster.known.generation.number == before + 1
    assert [*groups(cluster).values()] == ["prefill", "prefill", "decode"]
    assert operation.state is OperationState.RUNNING
    cluster.join_all()
    cluster.tick(0.2)
    assert operation.message == "scaled to 2 prefill, 1 decode and 2 expert workers"
    assert cluster.state == "SERVING"
    cluster.disconnect("attention-1")
    cluster.join_all()
    pass_time(cluster, 1.0)
    assert cluster.started() == ["attention-1.2"]
    cluster.bring_up("attention-1.2")
    assert groups(cluster)["attention-1.2"] == "prefill"


def test_groups_change_once_the_new_workers_serve() -> None:
    """Else there would be no decode group while they start."""
    cluster = with_groups(2, 1)
    operation = scale(cluster, prefill=2, decode=1)
    assert cluster.started() == ["attention-2"]
    assert [*groups(cluster).values()] == ["prefill", "decode"]
    cluster.bring_up("attention-2")
    cluster.join_all()
    assert [*groups(cluster).values()] == ["prefill", "decode", "decode"]
    pass_time(cluster, 0.5)
    assert [*groups(cluster).values()] == ["prefill", "prefill", "decode"]
    assert operation.phase == "form a generation with them"
    cluster.join_all()
    pass_time(cluster, 0.5)
    assert operation.state is OperationState.SUCCEEDED


def test_a_scaling_that_is_rolled_back_restores_the_groups() -> None:
    """Each time, although the removed place stays known."""
    cluster = with_groups(3, 1)
    for _ in range(2):
        operation = scale(cluster, prefill=3, decode=1)
        assert cluster.started() != []
        cluster.controller.scaling.cancel(operation, cluster.now)
        pass_time(cluster, 0.5)
        assert operation.state is OperationState.CANCELLED
        assert [*groups(cluster).values()] == ["prefill", "decode", "decode"]
        assert cluster.known.places.num_prefill == 1


def test_a_change_that_is_cancelled_while_it_forms_is_undone() -> None:
    cluster = with_groups(3, 1)
    operation = scale(cluster, prefill=2, decode=1)
    cluster.controller.scaling.cancel(operation, cluster.now)
    cluster.join_all()
    pass_time(cluster, 0.5)
    cluster.join_all()
    assert operation.state is OperationState.CANCELLED
    assert [*groups(cluster).values()] == ["prefill", "decode", "decode"]


def test_the_size_of_one_group_alone_can_shrink() -> None:
    cluster = with_groups(4, 2)
    operation = scale(cluster, prefill=1)
    cluster.join_all()
    pass_time(cluster, 0.5)
    assert operation.phase == "move requests to other workers"
    say_requests(cluster, "attention-3", 0.0)
    cluster.tick(0.1)
    cluster.join_all()
    cluster.tick(0.1)
    cluster.controller.draining.ended(["attention-3"], cluster.now)
    assert operation.message == "scaled to 1 prefill, 2 decode and 2 expert workers"
    assert [*groups(cluster).values()] == ["prefill", "decode", "decode"]


def test_an_empty_place_of_the_prefill_group_goes_and_another_worker_computes_prompts() -> None:
    cluster = with_groups(3, 1)
    cluster.disconnect("attention-0")
    cluster.join_all()
    operation = scale(cluster, decode=1)
    cluster.join_all()
    pass_time(cluster, 0.5)
    cluster.join_all()
    pass_time(cluster, 0.5)
    assert operation.state is OperationState.SUCCEEDED
    assert groups(cluster) == {"attention-1": "prefill", "attention-2": "decode"}


def test_expert_workers_of_a_group_alone_keep_their_number() -> None:
    """Only attention workers change their groups."""
    cluster = with_groups(3, 1, share_experts="no")
    found = {m.name: m.group for m in cluster.known.generation.experts}
    assert found == {"expert-0": "prefill", "expert-1": "decode"}
    with pytest.raises(RequestError, match=r"expert \(3\) must be left out if step groups have"):
        scale(cluster, expert=3)
    progress = cluster.known.workers["expert-0"].step_progress()
    assert not progress.group, "its empty steps of the other group show no progress of its own"
    scale(cluster, prefill=2, decode=1, expert=2)
    assert [*groups(cluster).values()] == ["prefill", "prefill", "decode"]
    assert {m.name: m.group for m in cluster.known.generation.experts} == found


@pytest.mark.parametrize(
    ("order", "text"),
    [
        ({"prefill": 0}, r"prefill \(0\) must be at least 1"),
        ({"decode": 0}, r"decode \(0\) must be at least 1"),
        ({"attention": 1}, r"attention \(1\) must exceed the 1 prefill workers"),
        ({"attention": 3, "decode": 2}, r"attention \(3\) must be left out with prefill"),
    ],
)
def test_sizes_of_groups_that_cannot_be(order: dict[str, Any], text: str) -> None:
    with pytest.raises(RequestError, match=text):
        scale(with_groups(3, 1), **order)
    with pytest.raises(RequestError, match=r"decode \(1\) needs a cluster that was started with"):
        scale(serving(), decode=1)
