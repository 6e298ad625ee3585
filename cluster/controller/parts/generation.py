"""Forms and runs generations: a generation is announced, and runs when it is complete.

    begin ─▶ NewGeneration to every member ─▶ GenerationReady from all, and all experts in memory
        ─▶ RunGeneration(first step above the highest step of any member)

The controller decides on members and placement.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from cluster.controller.parts.generation_round import GenerationRound, Phase
from cluster.controller.parts.host import ControllerHost
from cluster.core.frames import GenerationReady, NewGeneration, RunGeneration
from cluster.core.placement import ExpertPlacement
from cluster.core.states import WorkerState
from cluster.core.topology import Generation, Member


class Generations:
    """The generations of one cluster. Owned by the controller; one thread, time passed in."""

    def __init__(self, host: ControllerHost, *, term: int, identity: str, now: float) -> None:
        """``term`` and ``identity`` are the controller's."""
        self.round = GenerationRound(Generation(number=0, members=()), now, Phase.STALLED)
        """The newest generation; number 0 before the first."""
        self.experts_complete = False
        """Every expert had a slot when the newest generation was formed."""
        self._host = host
        self._term = term
        self._identity = identity

    @property
    def is_forming(self) -> bool:
        """A generation is announced but does not run yet."""
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
            generation=generation,
            placement=placement,
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
        """Run the generation that is being formed if it is complete."""
        host = self._host
        if not self.is_forming or not self.round.is_complete or host.awaits_experts:
            return
        highest = self.round.highest_epoch
        if highest > host.placement.epoch:
            # a survivor ran a later epoch than the controller knew; the new one must be higher
            self.begin(self.round.members, replace(host.placement, epoch=highest + 1), now)
            return
        self._run(now)

    def stall(self, members: Sequence[Member], now: float) -> None:
        """No generation can run: keep these members for a later one."""
        survivors = Generation(number=self.round.number, members=tuple(members))
        self.round = GenerationRound(survivors, now, Phase.STALLED)
        self._stand_by(members)

    def restore(self, generation: Generation, now: float) -> None:
        """A restarted controller found workers of this generation."""
        self.round = GenerationRound(generation, now)

    def go_on(self) -> None:
        """All members of the restored generation run it."""
        self.experts_complete = True
        self.round.phase = Phase.RUNNING

    def _stand_by(self, members: Sequence[Member]) -> None:
        """Serving members become ready: they run no steps until the next RunGeneration."""
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
