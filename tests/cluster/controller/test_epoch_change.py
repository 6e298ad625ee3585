"""One change of the placement, with workers that exist only as the frames that they send."""

from __future__ import annotations

from typing import TypeVar

import pytest
from msgspec.structs import replace

from cluster.controller.cluster import Cluster
from cluster.controller.epoch_change import ChangeState, EpochChange
from cluster.controller.membership import GenerationRound
from cluster.core.frames import (
    ControlFrame,
    EpochReady,
    EpochSwitched,
    ExpertsLoaded,
    LoadExperts,
    NewEpoch,
    SwitchEpoch,
)
from cluster.core.placement import contiguous
from cluster.core.topology import Generation, Member
from cluster.planner.stages import SlotFill, Stage, next_stage
from tests.cluster.controller.fakes_cluster import BANKS, CONFIG, FakeWorkerGroup, make_members

FrameT = TypeVar("FrameT", bound=ControlFrame)
NUM_SLOTS = 6


class Host(Cluster):
    """A cluster of which a generation and a placement are known."""

    def __init__(self) -> None:
        super().__init__(
            make_members(2, 3),
            contiguous(BANKS, 3, 1, epoch=7),
            CONFIG,
            num_slots=NUM_SLOTS,
            now=100.0,
        )
        self.link = FakeWorkerGroup()
        self.link.cluster = self
        self.members = tuple(
            replace(r.member, weights_address=f"10.0.0.{r.member.device}:7")
            if r.member.holds_experts
            else r.member
            for r in self.workers
        )
        self.begin(4, self.members)

    def begin(self, number: int, members: tuple[Member, ...]) -> None:
        """A generation begins."""
        generation = Generation(number=number, members=members)
        self.membership.restore(GenerationRound(generation, 100.0), 0)

    def orders(self) -> list[tuple[str, LoadExperts]]:
        """All load orders so far, each with the worker that it was sent to."""
        return [
            (name, frame)
            for name, frames in self.link.sent.items()
            for frame in frames
            if isinstance(frame, LoadExperts)
        ]


def stage(host: Host) -> Stage:
    """Device 0 is to get an expert that 1 and 2 hold, and device 2 one that 0 holds."""
    target = contiguous(BANKS, 3, 3)
    found = next_stage(host.placement, target, NUM_SLOTS, frozenset({0, 1, 2}))
    assert found is not None
    assert found.fills
    return found


def begin(host: Host, **limits: float) -> EpochChange:
    return begin_stage(host, stage(host), **limits)


def begin_stage(host: Host, wanted: Stage, **limits: float) -> EpochChange:
    return EpochChange(host, wanted, 100.0, **limits)


def state_of(change: EpochChange) -> ChangeState:
    """Asked anew each time."""
    return change.state


def load_all(host: Host, change: EpochChange, error: str = "") -> None:
    for name, order in host.orders():
        change.frame(name, ExpertsLoaded(order=order.order, error=error, num_bytes=10), 101.0)


def prepare_all(host: Host, change: EpochChange) -> None:
    for member in host.members:
        change.frame(member.name, EpochReady(generation=4, epoch=8), 106.0)


def test_it_loads_informs_all_members_and_switches() -> None:
    host = Host()
    change = begin(host, limit_s=20.0, bytes_per_s=5e6)
    assert state_of(change) is ChangeState.LOAD
    wanted = {(f.device, f.bank, f.slot, f.expert) for f in change.stage.fills}
    ordered = set()
    devices = {m.name: m.device for m in host.members}
    for name, order in host.orders():
        assert order.source["kind"] == "peer"
        assert (order.source["bytes_per_s"], order.source["limit_s"]) == (5e6, 20.0)
        peer = devices[order.source["peer"]]
        assert order.source["address"] == f"10.0.0.{peer}:7"
        for bank, slot, expert in order.experts:
            ordered.add((devices[name], bank, slot, expert))
            assert expert in host.placement.banks[bank].physical_to_logical[peer]
    assert ordered == wanted
    assert {"worker": "expert-0", "from": "expert-1"} in change.loading
    load_all(host, change)
    assert state_of(change) is ChangeState.PREPARE
    assert change.num_loaded == len(wanted)
    assert change.num_bytes == 10 * len(host.orders())
    for member in host.members:
        frame = host.link.last(member.name, NewEpoch)
        assert frame is not None
        assert (frame.generation, frame.epoch, frame.base_epoch) == (4, 8, 7)
        assert [place for place, _ in frame.banks] == [0, 1]
    prepare_all(host, change)
    assert state_of(change) is ChangeState.SWITCH
    switch = host.link.last("attention-0", SwitchEpoch)
    assert switch == SwitchEpoch(generation=4, epoch=8, oldest_epoch=8)
    assert host.link.last("attention-1", SwitchEpoch) is None
    assert host.placement.epoch == 7
    change.frame("attention-0", EpochSwitched(generation=4, epoch=8, step=31), 107.0)
    assert state_of(change) is ChangeState.DONE
    assert host.placement == change.stage.placement


def test_all_step_groups_switch_before_the_placement_is_in_force() -> None:
    """While one runs the new epoch, the other may still run the old one."""
    host = Host()
    of_rank = {"attention-0": "prefill", "attention-1": "decode"}
    host.begin(4, tuple(replace(m, group=of_rank.get(m.name, "")) for m in host.members))
    change = begin(host)
    load_all(host, change)
    prepare_all(host, change)
    for name in of_rank:
        order = SwitchEpoch(generation=4, epoch=8, oldest_epoch=7)
        assert host.link.last(name, SwitchEpoch) == order
        assert state_of(change) is ChangeState.SWITCH
        change.frame(name, EpochSwitched(generation=4, epoch=8, step=31), 107.0)
    assert state_of(change) is ChangeState.DONE


def test_nothing_to_load_is_reported_at_once() -> None:
    host = Host()
    same = Stage(fills=(), placement=replace(host.placement, epoch=8))
    change = begin_stage(host, same)
    assert state_of(change) is ChangeState.PREPARE
    frame = host.link.last("expert-2", NewEpoch)
    assert frame is not None
    assert frame.banks == ()


@pytest.mark.parametrize(
    ("nodes", "link_classes", "source"),
    [
        (("a", "b", "c"), ("", "", ""), "expert-1"),
        (("a", "b", "a"), ("", "", ""), "expert-2"),
        (("a", "b", "c"), ("x", "y", "x"), "expert-2"),
        (("a", "a", "b"), ("x", "x", "x"), "expert-1"),
        (("a", "b", "a"), ("x", "x", "y"), "expert-2"),
    ],
)
def test_weights_come_from_the_node_else_from_the_link_class(
    nodes: tuple[str, ...], link_classes: tuple[str, ...], source: str
) -> None:
    host = Host()
    members = tuple(
        replace(m, node=nodes[m.device], link_class=link_classes[m.device])
        if m.holds_experts
        else m
        for m in host.members
    )
    host.begin(4, members)
    fill = SlotFill(bank=0, device=0, slot=4, expert=9, sources=(1, 2))
    begin_stage(host, Stage(fills=(fill,), placement=stage(host).placement))
    ((name, order),) = host.orders()
    assert (name, order.source["peer"]) == ("expert-0", source)


def test_another_source_is_tried_and_the_checkpoint_last() -> None:
    host = Host()
    change = begin(host)
    ((name, first), *_) = host.orders()
    tried = [first.source["peer"]]
    order = first
    while order.source["kind"] == "peer":
        change.frame(name, ExpertsLoaded(order=order.order, error="reset"), 105.0)
        newest = host.link.last(name, LoadExperts)
        assert newest is not None
        assert newest.experts == first.experts
        assert newest.source.get("peer") not in tried
        tried.append(str(newest.source.get("peer")))
        order = newest
    assert order.source == {"kind": "checkpoint", "limit_s": 115.0, "bytes_per_s": None}
    assert state_of(change) is ChangeState.LOAD
    change.frame(name, ExpertsLoaded(order=order.order, error="no such file"), 106.0)
    assert state_of(change) is ChangeState.FAILED
    assert change.reason == f"{name}: no such file"
    assert host.placement.epoch == 7


@pytest.mark.parametrize("at", ["load", "prepare"])
def test_what_takes_too_long_is_given_up(at: str) -> None:
    host = Host()
    change = begin(host, limit_s=5.0)
    if at == "prepare":
        load_all(host, change)
    change.tick(105.0)
    assert not change.is_over
    change.tick(105.1)
    assert state_of(change) is ChangeState.FAILED
    assert "within 5 s" in change.reason
    prepare_all(host, change)  # too late
    assert host.link.last("attention-0", SwitchEpoch) is None


def test_an_ordered_switch_is_waited_for() -> None:
    host = Host()
    change = begin(host, limit_s=5.0)
    load_all(host, change)
    prepare_all(host, change)
    change.tick(900.0)
    assert state_of(change) is ChangeState.SWITCH
    assert not change.cancel("somebody asked")


@pytest.mark.parametrize("at", ["load", "prepare", "switch"])
def test_a_new_generation_ends_it(at: str) -> None:
    host = Host()
    change = begin(host)
    if at != "load":
        load_all(host, change)
    if at == "switch":
        prepare_all(host, change)
    host.begin(5, host.members[:-1])
    change.tick(101.0)
    assert state_of(change) is ChangeState.FAILED
    assert change.reason == "generation 5 began"
    change.frame("attention-0", EpochSwitched(generation=4, epoch=8, step=9), 107.0)
    assert host.placement.epoch == 7


def test_a_worker_that_cannot_run_it_ends_it() -> None:
    host = Host()
    change = begin(host)
    load_all(host, change)
    change.frame("expert-1", EpochReady(generation=4, epoch=8, error="no maps"), 106.0)
    assert (state_of(change), change.reason) == (ChangeState.FAILED, "expert-1: no maps")


def test_strangers_and_stale_answers_mean_nothing() -> None:
    host = Host()
    change = begin(host)
    ((name, order), *_) = host.orders()
    change.frame("expert-9", ExpertsLoaded(order=order.order), 101.0)
    change.frame(name, ExpertsLoaded(order=999), 101.0)
    assert change.num_loaded == 0
    load_all(host, change)
    for member in host.members:
        change.frame(member.name, EpochReady(generation=3, epoch=8), 106.0)
        change.frame(member.name, EpochReady(generation=4, epoch=7), 106.0)
    assert state_of(change) is ChangeState.PREPARE
    prepare_all(host, change)
    change.frame("attention-0", EpochSwitched(generation=4, epoch=6, step=1), 107.0)
    assert state_of(change) is ChangeState.SWITCH


def test_it_can_be_cancelled_before_the_switch() -> None:
    host = Host()
    change = begin(host)
    assert change.cancel("somebody asked")
    assert (state_of(change), change.reason) == (ChangeState.FAILED, "somebody asked")
    asked = {name for name, order in host.orders() if order.experts}
    given_up = {name for name, order in host.orders() if order.source["kind"] == "give up"}
    assert given_up == asked
    load_all(host, change)
    assert host.link.last("expert-0", NewEpoch) is None
