"""The newest generation: its phase, its members' answers, and their reports of lost peers.

FORMING ──▶ RUNNING        every member has answered, and every expert is in memory
   └──────────┴──▶ STALLED    no generation can run with these members
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from cluster.core.frames import GenerationReady
from cluster.core.placement import FREE_SLOT, ExpertPlacement
from cluster.core.topology import Generation, Member
from cluster.planner.stages import SlotFill
from cluster.policy.failure import PeerReport


class Phase(Enum):
    FORMING = "forming"
    """Announced to its members."""
    RUNNING = "running"
    """Its members run steps."""
    STALLED = "stalled"
    """Cannot run; its members wait for the next generation."""


@dataclass(slots=True)
class GenerationRound:
    """The newest generation and its members' answers; number 0 before the first."""

    generation: Generation
    began_at: float
    """Monotonic time of its announcement."""
    phase: Phase = Phase.FORMING
    answers: dict[str, GenerationReady] = field(default_factory=dict)
    """By name, of the members that have opened their edges."""
    reports: list[PeerReport] = field(default_factory=list)
    """Of members that lost another."""
    loaded: list[SlotFill] = field(default_factory=list)
    """What members have loaded since it began."""

    @property
    def number(self) -> int:
        return self.generation.number

    @property
    def members(self) -> tuple[Member, ...]:
        """All workers that take part."""
        return self.generation.members

    def late(self) -> list[str]:
        """Members that have not answered."""
        return [m.name for m in self.members if m.name not in self.answers]

    def missing(self, placement: ExpertPlacement) -> list[SlotFill]:
        """Experts that the maps name, and that are not where they should be by the answers."""
        loaded = {(f.bank, f.device, f.slot, f.expert) for f in self.loaded}
        found = []
        for member in self.generation.experts:
            held = self.answers[member.name].slots
            for bank, maps in enumerate(placement.banks):
                row, wanted = held[bank : bank + 1], maps.physical_to_logical[member.device]
                if row and row[0] == wanted:
                    continue
                have = dict(enumerate(row[0] if row else ()))
                found += [
                    SlotFill(bank=bank, device=member.device, slot=slot, expert=expert)
                    for slot, expert in enumerate(wanted)
                    if expert not in (FREE_SLOT, have.get(slot))
                    and (bank, member.device, slot, expert) not in loaded
                ]
        return found

    @property
    def first_step(self) -> int:
        """The step number after the highest that any member has seen."""
        return max((a.highest_step for a in self.answers.values()), default=0) + 1

    @property
    def highest_epoch(self) -> int:
        """Highest placement epoch in the answers so far."""
        return max((a.highest_epoch for a in self.answers.values()), default=0)

    def drop_reports(self, name: str) -> None:
        """Forget reports by and about a lost worker."""
        self.reports = [r for r in self.reports if name not in (r.reporter, r.suspect)]
