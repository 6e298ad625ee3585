"""What an engine does around a scheduler between a proposal and its grant."""

from __future__ import annotations

from workers.requests.sequence import SequenceState
from workers.requests.step_header import Grant
from workers.scheduling.scheduler import Scheduler
from workers.scheduling.step_intent import Restriction, StepIntent
from workers.scheduling.step_plan import RowsWanted, StepPlan


class Planner:
    """Proposes the rows of a scheduler, and plans what is granted of the last proposal."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.restriction = Restriction()
        """Which requests may have rows from now on."""
        self._intent = StepIntent()

    def wanted(self) -> RowsWanted:
        self._intent = self.scheduler.intent(self.restriction)
        return self._intent.wanted

    def grant(self, decode_rows: int, prefill_rows: int) -> StepPlan:
        grant = Grant(decode_rows=decode_rows, prefill_rows=prefill_rows)
        return self.scheduler.plan(self._intent.with_restriction(self.restriction), grant)

    def take_admissible(self, at_most: int) -> list[SequenceState]:
        return self.scheduler.take_admissible(self.restriction, at_most)
