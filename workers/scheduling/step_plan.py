"""The rows of a step: those that could run on a rank, and those that are planned. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from msgspec import Struct

from workers.kv.state_slots import StateMove
from workers.requests.sequence import SequenceState
from workers.requests.traced import Parents


class PlannedRows(Struct, frozen=True):
    """Neighbouring rows of one sequence in a plan. Its block table covers them already."""

    sequence: SequenceState
    first: int
    count: int
    is_decode: bool
    """A row that continues an output, and rows of ``drafts``."""
    num_new_blocks: int
    """Blocks at the end of the block table that this plan allocated after the admission."""
    is_admitted: bool
    """The sequence was waiting before this plan."""
    states: StateMove | None = None
    """Its recurrent states; None: the model has none."""
    drafts: tuple[int, ...] = ()
    """Guesses at the tokens behind the newest one: those of the last rows."""

    @property
    def draws_token(self) -> bool:
        """The last row but ``drafts`` is the newest token: its logits give the next one."""
        return self.first + self.count - len(self.drafts) == self.sequence.num_tokens

    def one_by_one(self) -> Iterator[PlannedRows]:
        """Decode rows, each as an entry of its own: to the model every one is a decode."""
        for row in range(self.count):
            first = row + len(self.drafts) - self.count
            drafts = self.drafts[first : first + 1] if first >= 0 else ()
            yield PlannedRows(self.sequence, self.first + row, 1, True, 0, False, drafts=drafts)


def single_rows(planned: Sequence[PlannedRows]) -> Sequence[PlannedRows]:
    """Entries for the model: those with drafts are taken apart, in place."""
    if not any(rows.drafts for rows in planned):
        return planned
    return [one for rows in planned for one in (rows.one_by_one() if rows.drafts else (rows,))]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The rows of one step."""

    rows: tuple[PlannedRows, ...]
    """Decodes first, each part in the order of priority and arrival."""

    @property
    def num_rows(self) -> int:
        return sum(r.count for r in self.rows)

    @property
    def request_ids(self) -> dict[str, None]:
        """The requests of its rows, in order."""
        return dict.fromkeys(r.sequence.request.request_id for r in self.rows)

    def cache_slots(self, block_size: int) -> list[int]:
        """Cache slots (block * block_size + offset) of all rows."""
        return [
            planned.sequence.blocks[position // block_size] * block_size + position % block_size
            for planned in self.rows
            for position in range(planned.first, planned.first + planned.count)
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBudget:
    """What a step of one worker has at most."""

    max_num_seqs: int
    """Sequences that run."""
    max_rows: int
    """Rows, prompts and decodes together."""
    max_decode_rows: int
    """Rows of decodes, those of drafts included."""


@dataclass(frozen=True, slots=True)
class RowsWanted:
    """What the next step could run, for the proposal to the leader."""

    decode_rows: int = 0
    """One per sequence of which only the newest output token is not computed, and those of
    drafts."""
    prefill_rows: int = 0
    """Prompt rows within the token budget."""
    edge_share: int = 0
    """See ``StepProposal``."""
    is_alone: bool = False
    """They are one request's, and no other's may be in the step on any rank."""
    parents: Parents = ()
    """See ``StepProposal``."""
    draft_rows: int = 0
    """Of the decode rows those of drafts."""
