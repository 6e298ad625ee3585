"""A worker's membership, over a data plane that only notes what it is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from benchmarks.harness.members import member_of
from cluster.core.errors import GenerationChangedError, PeerLostError, TransportError
from cluster.core.frames import (
    ControlFrame,
    ControllerSnapshot,
    DrainRequest,
    GenerationReady,
    NewEpoch,
    NewGeneration,
    PeerLost,
    RunGeneration,
    SlotContents,
    SwitchEpoch,
    WorkerReport,
)
from cluster.core.placement import FREE_SLOT, contiguous
from cluster.core.topology import Generation
from tests.cluster.controller.fakes_cluster import BANKS
from workers.process.control.membership import Membership, MembershipHooks, MembershipState
from workers.process.worker.control_side import ControlSide
from workers.process.worker.lifetime import Lifetime

MAPS = contiguous(BANKS, 1, 1)
FULL = tuple(maps.physical_to_logical[0] for maps in MAPS.banks)
"""What the slots of its only device hold."""
MEMBERS = (member_of("attention-0"), member_of("expert-0", device=0))


class FakeDataPlane:
    """Connections, step channel and transport of a worker in one."""

    def __init__(self) -> None:
        self.failure: TransportError | None = None
        """What the next generation meets while its edges open."""
        self.highest_step = 0
        self.highest_epoch = 0
        self.is_leader = False
        self.started: list[tuple[int, int]] = []
        """(first step, epoch) of every generation that ran."""

    def apply_generation(self, generation: Generation) -> None:
        if self.failure is not None:
            raise self.failure

    def start_generation(self, first_step: int, epoch: int) -> None:
        self.started.append((first_step, epoch))


@dataclass
class World:
    """One membership, what it sends, and what its slots hold."""

    data: FakeDataPlane = field(default_factory=FakeDataPlane)
    sent: list[ControlFrame] = field(default_factory=list)
    slots: SlotContents = FULL

    def __post_init__(self) -> None:
        self.membership = Membership(
            "expert-0",
            MembershipHooks(
                send=self.sent.append,
                enter=lambda generation, placement: None,
                lose_members=lambda names: None,
                begin_steps=lambda: None,
                slots=lambda: self.slots,
            ),
        )
        self.membership.set_data_plane(self.data, self.data, self.data)  # type: ignore[arg-type]

    def report(self) -> WorkerReport:
        """What it says to a new controller."""
        (found,) = self.membership.worker_report({})
        assert isinstance(found, WorkerReport)
        return found

    def announce(self, number: int) -> None:
        """The controller announces a generation of all members."""
        frame = NewGeneration(
            term=1, generation=Generation(number=number, members=MEMBERS), placement=MAPS
        )
        self.membership.record_command(frame)
        self.membership.handle(frame)


def test_an_answer_and_a_report_name_what_the_slots_hold() -> None:
    world = World(slots=((0, -1, 2),))
    world.announce(1)
    assert world.sent == [
        GenerationReady(generation=1, highest_step=0, highest_epoch=1, slots=((0, -1, 2),))
    ]
    world.slots = ((0, 1, 2),)
    assert world.report().slots == ((0, 1, 2),)


def run(number: int) -> RunGeneration:
    return RunGeneration(generation=number, first_step=1)


def test_a_generation_runs_once_it_is_ready_and_ordered() -> None:
    world = World()
    world.announce(1)
    assert not world.membership.is_running
    world.membership.handle(run(2))
    assert not world.membership.is_running
    world.membership.handle(run(1))
    assert world.membership.is_running
    assert world.data.started == [(1, MAPS.epoch)]


def test_a_generation_does_not_run_without_an_expert_that_its_maps_name() -> None:
    world = World(slots=(*FULL[:-1], (FREE_SLOT, *FULL[-1][1:])))
    world.announce(1)
    world.membership.handle(run(1))
    assert not world.membership.is_running
    assert world.data.started == []
    world.slots = FULL
    world.membership.handle(run(1))  # it has left that generation
    assert not world.membership.is_running
    world.announce(2)
    world.membership.handle(run(2))
    assert world.membership.is_running


def test_a_worker_belongs_to_its_generation_while_no_step_runs() -> None:
    """A signal to end that meets a change of the generation asks for a drain all the same."""
    world, sent = World(), list[ControlFrame]()

    def asks_for_drain() -> bool:
        side: Any = SimpleNamespace(membership=world.membership, send=sent.append)
        return ControlSide.request_drain(side, Lifetime())

    assert not asks_for_drain()
    world.announce(1)
    assert asks_for_drain()
    world.membership.handle(run(1))
    world.membership.report_lost_peer(PeerLostError("attention-0", "reset"))
    assert asks_for_drain()
    world.membership.raise_fence()
    assert not asks_for_drain()
    assert sent == [DrainRequest(), DrainRequest()]


def test_a_generation_that_lost_a_peer_does_not_run_again() -> None:
    world = World()
    world.announce(1)
    world.membership.handle(run(1))
    world.membership.report_lost_peer(PeerLostError("attention-0", "reset"))
    world.membership.handle(run(1))
    assert not world.membership.is_running


def test_the_fence_stops_what_runs_until_the_next_generation() -> None:
    world = World()
    world.announce(1)
    world.membership.handle(run(1))
    assert world.membership.raise_fence() == 1
    assert world.membership.is_fenced
    assert not world.membership.is_running
    world.membership.stop_steps()
    world.membership.handle(run(1))
    assert not world.membership.is_running
    world.announce(2)
    world.membership.handle(run(2))
    assert world.membership.is_running
    assert not world.membership.is_fenced


def test_a_step_renews_the_lease_when_others_are_known_to_have_it() -> None:
    membership = World().membership
    membership.record_commit(is_shared=True)
    assert membership.last_shared_commit == membership.last_commit
    shared = membership.last_commit
    membership.record_commit(is_shared=False)
    assert membership.last_shared_commit == shared < membership.last_commit
    membership.confirm_commit()
    assert membership.last_shared_commit == membership.last_commit


def test_orders_from_before_the_fence_do_not_open_it() -> None:
    """They waited in the queue of a process that was stopped until its lease had run out."""
    world = World()
    world.announce(1)
    world.membership.handle(run(1))
    order = NewGeneration(term=1, generation=Generation(number=2, members=MEMBERS), placement=MAPS)
    world.membership.record_command(order)
    assert world.membership.raise_fence() == 2
    world.membership.handle(order)
    world.membership.handle(run(2))
    assert world.membership.generation.number == 2
    assert not world.membership.is_running
    assert world.membership.is_fenced
    assert world.data.started == [(1, MAPS.epoch)]


def test_a_generation_that_is_interrupted_while_it_opens_can_be_followed_by_another() -> None:
    world = World()
    world.data.failure = GenerationChangedError("generation 2 was announced")
    world.announce(1)
    states = [world.membership.state]
    world.data.failure = None
    world.announce(2)
    states.append(world.membership.state)
    assert states == [MembershipState.OUTSIDE, MembershipState.READY]


def test_a_peer_that_is_lost_while_edges_open_is_reported() -> None:
    """Or cannot be reached, refuses, or builds no world: the worker itself lives on."""
    world = World()
    world.data.failure = PeerLostError("attention-0", "refused")
    world.announce(1)
    assert world.sent[-1] == PeerLost(worker="attention-0", generation=1, reason="refused")
    world.data.failure = None
    world.announce(2)
    assert isinstance(world.sent[-1], GenerationReady)


def test_a_leader_that_will_switch_the_epoch_does_not_count_as_running() -> None:
    """The order of the old controller waits; the new one must not take the old epoch for true."""
    world = World()
    world.announce(1)
    world.membership.handle(run(1))
    assert world.report().running
    world.membership.record_command(NewEpoch(generation=1, epoch=2, base_epoch=1, banks=()))
    assert world.report().running
    assert world.report().known_epoch == 2
    world.membership.record_command(SwitchEpoch(generation=1, epoch=2, oldest_epoch=2))
    assert not world.report().running
    world.announce(2)
    world.membership.handle(run(2))
    assert world.report().running


def test_a_worker_knows_the_places_that_were_named_last() -> None:
    membership = World().membership
    generation = Generation(number=1, members=MEMBERS)
    order = NewGeneration(term=1, generation=generation, placement=MAPS, places=("expert-0",))
    snapshot = ControllerSnapshot(term=1, memory={}, places=("expert-0", "expert-1"))
    found = []
    for frame in (order, snapshot):
        membership.record_command(frame)
        found.append(membership.places)
    assert found == [("expert-0",), ("expert-0", "expert-1")]
