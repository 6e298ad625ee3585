"""The newest generation: its phase, its members' answers, and their reports of lost peers.

FORMING ──▶ RUNNING        every member has answered, and every expert is in memory
   └──────────┴──▶ STALLED    no generation can run with these members
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from cluster.core.frames import GenerationReady
from cluster.core.topology import Generation, Member
from cluster.policy.failure import PeerReport, confirm_suspect


class Phase(Enum):
    """Phases of a generation."""

    FORMING = "forming"
    """Announced to its members."""
    RUNNING = "running"
    """Its members run steps."""
    STALLED = "stalled"
    """Cannot run; its members wait for the next generation."""


class GenerationRound:
    """The newest generation and its members' answers; number 0 before the first."""

    def __init__(
        self, generation: Generation, began_at: float, phase: Phase = Phase.FORMING
    ) -> None:
        """``began_at`` is the monotonic time of its announcement."""
        self.generation = generation
        self.phase = phase
        self.began_at = began_at
        self._answers: dict[str, GenerationReady] = {}
        self._reports: list[PeerReport] = []

    @property
    def number(self) -> int:
        return self.generation.number

    @property
    def members(self) -> tuple[Member, ...]:
        """All workers that take part."""
        return self.generation.members

    def answer(self, name: str, frame: GenerationReady) -> None:
        """A member has opened its edges."""
        self._answers[name] = frame

    @property
    def is_complete(self) -> bool:
        """Every member has answered."""
        return all(m.name in self._answers for m in self.members)

    def late(self) -> list[str]:
        """Members that have not answered."""
        return [m.name for m in self.members if m.name not in self._answers]

    @property
    def first_step(self) -> int:
        """The step number after the highest that any member has seen."""
        return max((a.highest_step for a in self._answers.values()), default=0) + 1

    @property
    def highest_epoch(self) -> int:
        """Highest placement epoch in the answers so far."""
        return max((a.highest_epoch for a in self._answers.values()), default=0)

    def report(self, report: PeerReport) -> None:
        """A member reports that it lost another."""
        self._reports.append(report)

    def drop_reports(self, name: str) -> None:
        """Forget reports by and about a lost worker."""
        self._reports = [r for r in self._reports if name not in (r.reporter, r.suspect)]

    def suspect(self, now: float, roles: Mapping[str, str], confirm_s: float) -> PeerReport | None:
        """The report whose suspect must be declared lost now, if any."""
        return confirm_suspect(now, self._reports, roles, confirm_s)
