"""Forms and runs generations: one is announced to its members, and runs when nothing is missing.

    begin ─▶ NewGeneration to every member ─▶ GenerationReady from all, and all experts in memory
        ─▶ RunGeneration(first step above the highest any member saw)

``Generations`` does this for the controller, which decides with whom and with which placement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from cluster.control_frames import ControlFrame, GenerationReady, NewGeneration, RunGeneration
from cluster.generation_round import GenerationRound, Phase
from cluster.placement import ExpertPlacement
from cluster.states import WorkerState
from cluster.topology import Generation, Member
from cluster.worker_table import WorkerTable


class GenerationsHost(Protocol):
    """What the forming of generations needs of the controller."""

    workers: WorkerTable
    placement: ExpertPlacement

    @property
    def is_up(self) -> bool:
        """Nothing has ended the cluster yet."""

    @property
    def awaits_experts(self) -> bool:
        """Experts that the newest generation counts on are still being loaded."""

    def above(self, placement: ExpertPlacement) -> ExpertPlacement:
        """The placement, with an epoch above all that workers may have heard of."""

    def send(self, name: str, frame: ControlFrame) -> None:
        """Send to a worker."""

    def touch(self) -> None:
        """Something that snapshots show has changed."""

    def ran(self, first_step: int, now: float) -> None:
        """The newest generation was told to run, from this step on."""


class Generations:
    """See the module. Owned by the controller; one thread, time passed in."""

    def __init__(self, host: GenerationsHost, *, term: int, identity: str, now: float) -> None:
        """``term`` and ``identity`` are the controller's."""
        self.round = GenerationRound(Generation(number=0, members=()), now, Phase.STALLED)
        """The newest generation; number 0 before the first."""
        self.experts_complete = False
        """It has, or had when it was formed, every expert."""
        self._host = host
        self._term = term
        self._identity = identity

    @property
    def is_forming(self) -> bool:
        """A generation is announced and does not run yet."""
        return self.round.phase is Phase.FORMING and self._host.is_up

    def begin(self, members: Sequence[Member], placement: ExpertPlacement, now: float) -> None:
        """Announce the next generation to all its members."""
        host = self._host
        fresh = tuple(host.workers[m.name].member for m in members)
        generation = Generation(number=self.round.number + 1, members=fresh)
        self.round = GenerationRound(generation, now)
        host.placement = placement = host.above(placement)
        host.touch()
        self._stand_by(fresh)
        order = NewGeneration(
            term=self._term,
            controller=self._identity,
            generation=generation.to_dict(),
            placement=placement.to_dict(),
            drained=[r.name for r in host.workers if r.state is WorkerState.DRAINED],
        )
        for member in fresh:
            host.send(member.name, order)

    def answer(self, name: str, frame: GenerationReady, now: float) -> None:
        """A member has opened its edges."""
        if frame.generation != self.round.number or not self.is_forming:
            return  # an answer to an older generation, overtaken by a newer one
        self.round.answer(name, frame)
        self.run_if_ready(now)

    def run_if_ready(self, now: float) -> None:
        """Run the generation that is being formed when nothing is missing."""
        host = self._host
        if not self.is_forming or not self.round.is_complete or host.awaits_experts:
            return
        highest = self.round.highest_epoch
        if highest > host.placement.epoch:
            # A survivor ran a later epoch than we knew of: ours must not be below it.
            self.begin(self.round.members, replace(host.placement, epoch=highest + 1), now)
            return
        self._run(now)

    def stall(self, members: Sequence[Member], now: float) -> None:
        """No generation can run: keep these members for a later one."""
        survivors = Generation(number=self.round.number, members=tuple(members))
        self.round = GenerationRound(survivors, now, Phase.STALLED)
        self._stand_by(members)

    def adopt(self, generation: Generation, now: float) -> None:
        """A restarted controller found workers of this generation."""
        self.round = GenerationRound(generation, now)

    def go_on(self) -> None:
        """All members of the adopted generation run it."""
        self.experts_complete = True
        self.round.phase = Phase.RUNNING

    def _stand_by(self, members: Sequence[Member]) -> None:
        """These run no steps until they are told to."""
        for member in members:
            record = self._host.workers[member.name]
            if record.state is WorkerState.SERVING:
                record.enter(WorkerState.READY)

    def _run(self, now: float) -> None:
        first_step = self.round.first_step
        order = RunGeneration(generation=self.round.number, first_step=first_step)
        self.go_on()
        for member in self.round.members:
            record = self._host.workers[member.name]
            record.progress_at = now
            record.enter(WorkerState.SERVING)
            self._host.send(member.name, order)
        self._host.ran(first_step, now)
