"""Decode steps that are planned before the step before them is committed. Pure."""

from __future__ import annotations

from workers.requests.sequence import SequenceState
from workers.scheduling.block_manager import BlockManager
from workers.scheduling.step_plan import PlannedRows, StepPlan
from workers.scheduling.stop_conditions import StopConditions


class StepsAhead:
    """Plans the step after a decode step whose tokens are not known yet.

    Each sequence gets the row after its unknown token. If the token ends the sequence, this row was
    computed in vain.
    """

    def __init__(self, blocks: BlockManager, stop_conditions: StopConditions) -> None:
        self._blocks = blocks
        self._stop_conditions = stop_conditions

    def continuing(self, uncommitted: StepPlan) -> list[SequenceState]:
        """Return the sequences of an uncommitted step that still run and may need another token.

        Sequences that have ended since, were preempted, or reach their maximum length with the
        uncommitted token, are left out.
        """
        ends = self._stop_conditions.ends_with_next
        return [s for rows in uncommitted.running.rows if not ends(s := rows.sequence)]

    def plan(self, uncommitted: StepPlan, max_rows: int) -> StepPlan | None:
        """Plan a row of each sequence of ``continuing``, and allocate KV blocks for these rows.

        ``uncommitted``: the plan of a step of decodes. Returns None, without a change, if there is
        no such sequence, more than ``max_rows`` of them, or too few blocks are free.
        """
        sequences = self.continuing(uncommitted)
        if not 0 < len(sequences) <= min(max_rows, self._blocks.num_free):
            return None
        return StepPlan(tuple(map(self._row_after_next, sequences)))

    def _row_after_next(self, sequence: SequenceState) -> PlannedRows:
        num_new = self._blocks.grow(sequence, num_ahead=1)
        return PlannedRows(sequence, sequence.num_computed + 1, 1, True, num_new, False)
