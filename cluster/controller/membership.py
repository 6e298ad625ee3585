"""The generations of a cluster, and the placements that their members run.

The life of a generation:

    form ─▶ NewGeneration to every member ─▶ GenerationReady from all, experts in their slots
        ─▶ run ─▶ RunGeneration(first step above the highest step of any member)

If a member is lost before RunGeneration, the next generation is formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from msgspec.structs import replace

from cluster.controller.workers import WorkerTable
from cluster.core.frames import GenerationReady
from cluster.core.placement import FREE_SLOT, ExpertPlacement
from cluster.core.states import WorkerState, next_state
from cluster.core.topology import Generation, Member
from cluster.planner.stages import SlotFill
from cluster.policy.failure import PeerReport
from cluster.policy.places import Places


class Phase(Enum):
    """Phase of the cluster's newest generation."""

    FORMING = "forming"
    """The generation has been announced to its members, but does not run yet."""
    RUNNING = "running"
    """The members of the generation run steps."""
    STALLED = "stalled"
    """The generation cannot run; its members wait for the next generation."""


_PHASES = {Phase.FORMING: {Phase.RUNNING, Phase.STALLED}, Phase.RUNNING: {Phase.STALLED}}


@dataclass(slots=True)
class GenerationRound:
    """The newest generation and its members' replies; number 0 before the first."""

    generation: Generation
    began_at: float
    """Monotonic time at which the generation was announced."""
    phase: Phase = Phase.FORMING
    answers: dict[str, GenerationReady] = field(default_factory=dict)
    """Member -> its reply to the generation's announcement, sent once its edges are open."""
    reports: list[PeerReport] = field(default_factory=list)
    """Reports of members about peers that they have lost."""
    loaded: list[SlotFill] = field(default_factory=list)
    """Experts that members have loaded since the generation was announced."""
    joins: frozenset[str] = frozenset()
    """Names of the members that were not in the generation that ran before."""
    before: ExpertPlacement | None = None
    """Placement of the generation that ran before, whose experts the workers' slots still hold.

    None if no member joins.
    """

    @property
    def number(self) -> int:
        return self.generation.number

    @property
    def members(self) -> tuple[Member, ...]:
        """Members of the generation."""
        return self.generation.members

    def late(self) -> list[str]:
        """Return the members that have not replied to the announcement of the generation."""
        return [m.name for m in self.members if m.name not in self.answers]

    def missing(self, placement: ExpertPlacement) -> list[SlotFill]:
        """Return the experts of a placement that are not in their slots yet.

        The contents of the slots are known from the members' replies and later loads.
        """
        loaded = {(f.bank, f.device, f.slot, f.expert) for f in self.loaded}
        return [
            SlotFill(bank=bank, device=member.device, slot=slot, expert=expert)
            for member in self.generation.experts
            for bank, slot, expert in placement.missing(
                member.device, self.answers[member.name].slots
            )
            if (bank, member.device, slot, expert) not in loaded
        ]

    @property
    def first_step(self) -> int:
        """First step number of the generation: one above the highest that any member has seen."""
        return max((a.highest_step for a in self.answers.values()), default=0) + 1

    @property
    def highest_epoch(self) -> int:
        """Highest placement epoch in the members' replies so far; 0 without a reply."""
        return max((a.highest_epoch for a in self.answers.values()), default=0)

    def next(
        self, generation: Generation, placement: ExpertPlacement, now: float
    ) -> GenerationRound:
        """Return the round of the next generation; ``placement`` is the placement in force."""
        names = frozenset(m.name for m in generation.members)
        joins, before = self.joins & names, self.before
        if self.phase is not Phase.FORMING:
            known, before = {m.name for m in self.members}, placement
            joins = names - known if self.phase is Phase.RUNNING else frozenset()
        return GenerationRound(generation, now, joins=joins, before=before if joins else None)

    def enter(self, phase: Phase) -> None:
        self.phase = next_state(self.phase, phase, _PHASES)

    def drop_reports(self, name: str) -> None:
        """Drop the reports by and about a lost worker."""
        self.reports = [r for r in self.reports if name not in (r.reporter, r.suspect)]


class MemberRecords:
    """Holds the newest generation and the placement in force.

    Other parts of the controller read generation and placement from ``Cluster``.
    """

    def __init__(
        self, placement: ExpertPlacement, workers: WorkerTable, places: Places, now: float
    ) -> None:
        self._workers = workers
        self._places = places
        self._switching = placement.epoch
        self.placement = placement
        """The placement in force, or that of the generation that is forming."""
        self.desired = placement
        """The placement of the complete cluster; rebalancing changes it."""
        self.round = GenerationRound(Generation(number=0, members=()), now, Phase.STALLED)
        """The newest generation with its members' replies; number 0 before the first."""
        self.experts_complete = False
        """Whether every expert had a slot when the newest generation was formed."""
        self._highest_epoch = 0

    def restore(self, collected: GenerationRound, highest_epoch: int) -> None:
        """Continue with the generation of an earlier controller.

        ``highest_epoch``: highest placement epoch that any worker knows.
        """
        self.round, self._highest_epoch = collected, highest_epoch

    def next_epoch(self) -> int:
        """Return a placement epoch (version of the placement) that no worker knows."""
        self._highest_epoch = max(self.placement.epoch, self._highest_epoch) + 1
        return self._highest_epoch

    @property
    def has_new_groups(self) -> bool:
        """Whether members of the newest generation have another step group in the next one."""
        members = self.round.generation.members
        return any(self._workers[m.name].member.group != m.group for m in members)

    def set_roles(self, num_prefill: int) -> None:
        """Divide attention workers into step groups, from the next generation on: the first
        ``num_prefill`` by rank compute prompts. With 0, there are no step groups."""
        self._places.set_roles(num_prefill)
        for record in self._workers.alive() if num_prefill else ():
            if record.member.runs_attention and (group := self._places.group_of(record.name)):
                record.set_group(group)

    def may_run(self, epoch: int) -> bool:
        """Whether members may run this placement epoch: the one in force, or one to which the step
        groups are switching, each with a step of its own."""
        return epoch in (self.placement.epoch, self._switching)

    def begin_switch(self, epoch: int) -> None:
        """Record that the step groups of the running generation switch to a placement epoch."""
        self._switching = epoch

    def activate(self, placement: ExpertPlacement) -> None:
        """Put a placement in force, after a step of the running generation has used its epoch.

        If the cluster is complete, the placement becomes the desired one too, unless a device has
        no expert in it, as in a drain.
        """
        self.placement, self._switching = placement, placement.epoch
        rows = [bank.physical_to_logical for bank in placement.banks]
        devices = self._places.devices() or {0}  # local mode
        uses_all = all(any(set(row[d]) - {FREE_SLOT} for row in rows) for d in devices)
        if uses_all and self._places.is_full(self.round.members):
            self.desired = placement

    def form(self, members: Sequence[Member], placement: ExpertPlacement, now: float) -> None:
        """Begin the next generation, with these members and this placement."""
        fresh = tuple(self._workers[m.name].member for m in members)
        generation = self.round.generation.successor(fresh)
        self.round = self.round.next(generation, self.placement, now)
        if self._highest_epoch > self.placement.epoch:  # workers may know that epoch
            epoch = max(self._highest_epoch + 1, placement.epoch)
            placement = replace(placement, epoch=epoch)
        self.placement, self._switching = placement, placement.epoch
        self._stand_by()

    def run(self, now: float) -> None:
        """Mark the newest generation as running and its members as serving."""
        formed = self.round
        self.experts_complete = True
        formed.enter(Phase.RUNNING)
        formed.joins, formed.before = frozenset(), None  # the other members free the old experts
        for member in formed.members:
            record = self._workers[member.name]
            record.progress_at = record.heard_at = now
            record.stalled_s = None
            record.enter(WorkerState.SERVING)

    def stall(self, members: Sequence[Member], now: float) -> None:
        """Record that no generation can run now; the next generation may use these members."""
        survivors = replace(self.round.generation, members=tuple(members))
        self.round = GenerationRound(survivors, now, Phase.STALLED)
        self._stand_by()

    def _stand_by(self) -> None:
        """Make serving members ready, since they run no steps until the next RunGeneration."""
        for member in self.round.members:
            record = self._workers[member.name]
            if record.state is WorkerState.SERVING:
                record.enter(WorkerState.READY)
