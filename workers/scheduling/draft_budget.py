"""Decides how many draft rows (of speculative decoding) a step has. Pure, no torch."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from workers.requests.sequence import SequenceState
from workers.scheduling.block_manager import BlockManager
from workers.scheduling.step_plan import PlannedRows, StepBudget
from workers.speculation.speculator import Speculator


class DraftBudget:
    """Decides how many draft rows a step requests, and which decodes use the granted draft rows.

    Drafts get only rows and KV blocks that are left over, and never preempt a sequence.
    """

    def __init__(self, speculator: Speculator, blocks: BlockManager, budget: StepBudget) -> None:
        self._speculator = speculator
        self._blocks = blocks
        self._budget = budget

    def num_wanted(
        self, decoding: Sequence[SequenceState], num_decodes: int, prefill_rows: int
    ) -> int:
        """Return the number of draft rows to request for a step, in addition to its other rows.

        ``num_decodes`` and ``prefill_rows``: decode rows without drafts, and prompt rows.
        """
        if not decoding:
            return 0
        self._speculator.plan_step(len(decoding))
        room = min(self._budget.max_decode_rows, self._budget.max_rows - prefill_rows) - num_decodes
        return max(min(sum(len(self._speculator.draft(s)) for s in decoding), room), 0)

    def add(self, num_decodes: int, decode_rows: int, rows: list[PlannedRows]) -> None:
        """Add drafts to planned decodes, within the granted decode rows and the budget.

        ``rows``: the plan, whose first ``num_decodes`` entries are decodes and are replaced. Drafts
        that are most likely right go first.
        """
        left = min(decode_rows - num_decodes, self._budget.max_rows - sum(r.count for r in rows))
        if left <= 0:
            return
        decodes = rows[:num_decodes]
        drafts_of = self._speculator.draft_all([planned.sequence for planned in decodes], left)
        for index, (planned, drafts) in enumerate(zip(decodes, drafts_of, strict=True)):
            if fitting := drafts[: self._blocks.num_drafts_that_fit(planned.sequence)]:
                num_new = self._blocks.grow(planned.sequence, len(fitting))
                rows[index] = replace(
                    planned,
                    count=1 + len(fitting),
                    num_new_blocks=planned.num_new_blocks + num_new,
                    drafts=fitting,
                )
