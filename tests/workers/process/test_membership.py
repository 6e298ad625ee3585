"""A worker's membership, over a data plane that only notes what it is asked."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.core.errors import TransportError
from cluster.core.frames import (
    ControlFrame,
    GenerationReady,
    NewGeneration,
    SlotContents,
    WorkerReport,
)
from cluster.core.placement import contiguous
from cluster.core.topology import Generation
from tests.cluster.controller.fakes_cluster import BANKS
from tests.harness.members import member_of
from workers.process.membership import Membership, MembershipHooks

MAPS = contiguous(BANKS, 1, 1)
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
    slots: SlotContents = ()

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
        self.membership.join(self.data, self.data, self.data)  # type: ignore[arg-type]

    def announce(self, number: int) -> None:
        """The controller announces a generation of all members."""
        frame = NewGeneration(
            term=1, generation=Generation(number=number, members=MEMBERS), placement=MAPS
        )
        self.membership.announced = frame
        self.membership.handle(frame)


def test_an_answer_and_a_report_name_what_the_slots_hold() -> None:
    world = World(slots=((0, -1, 2),))
    world.announce(1)
    assert world.sent == [
        GenerationReady(generation=1, highest_step=0, highest_epoch=1, slots=((0, -1, 2),))
    ]
    world.slots = ((0, 1, 2),)
    (report,) = world.membership.worker_report(1, {})
    assert isinstance(report, WorkerReport)
    assert report.slots == ((0, 1, 2),)
