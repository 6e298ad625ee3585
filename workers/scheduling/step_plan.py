"""The rows of a step: as wanted by a worker, and as planned after the grant. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from msgspec import Struct

from workers.kv.state_slots import StateMove
from workers.requests.sequence import SequenceState
from workers.requests.traced import Parents


class PlannedRows(Struct, frozen=True):
    """Consecutive rows of one sequence in a plan. Its block table already has their blocks."""

    sequence: SequenceState
    first: int
    count: int
    is_decode: bool
    """Whether this is a decode row, with the rows of its ``drafts``."""
    num_new_blocks: int
    """Number of blocks that this plan added to the block table after the admission."""
    is_admitted: bool
    """Whether this plan admitted the sequence."""
    states: StateMove | None = None
    """Recurrent states of the rows; None if the model has no such states."""
    drafts: tuple[int, ...] = ()
    """Draft tokens, one for each of the last rows: guesses of the tokens after the newest one."""

    @property
    def samples_token(self) -> bool:
        """Whether the rows include the newest token, so that the next token can be sampled."""
        return self.first + self.count - len(self.drafts) == self.sequence.num_tokens

    def split_by_row(self) -> Iterator[PlannedRows]:
        """Yield each row as a separate entry, because the model treats every row as a decode."""
        for row in range(self.count):
            first = row + len(self.drafts) - self.count
            drafts = self.drafts[first : first + 1] if first >= 0 else ()
            yield PlannedRows(self.sequence, self.first + row, 1, True, 0, False, drafts=drafts)


def single_rows(planned: Sequence[PlannedRows]) -> Sequence[PlannedRows]:
    """Entries for the model: each entry with drafts is split into one entry per row."""
    if not any(rows.drafts for rows in planned):
        return planned
    return [one for rows in planned for one in (rows.split_by_row() if rows.drafts else (rows,))]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The rows of one step."""

    rows: tuple[PlannedRows, ...]
    """The decodes by ``SequenceState.order``, then the prompt rows in turn of the tenants."""

    @property
    def num_rows(self) -> int:
        return sum(r.count for r in self.rows)

    @property
    def request_ids(self) -> dict[str, None]:
        """Ids of the requests of the rows, in order."""
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
    """Limits of a step of one worker."""

    max_num_seqs: int
    """Maximum number of running sequences."""
    max_rows: int
    """Maximum number of rows, prompts and decodes together."""
    max_decode_rows: int
    """Maximum number of decode rows, including drafts."""


@dataclass(frozen=True, slots=True)
class RowsWanted:
    """Rows that the next step could run, for the proposal to the leader."""

    decode_rows: int = 0
    """Number of decode rows: one for each decoding sequence, and the draft rows."""
    prefill_rows: int = 0
    """Number of prompt rows within the token budget."""
    edge_share: int = 0
    """See ``StepProposal``."""
    is_alone: bool = False
    """Whether the rows belong to a request that must run alone in the step, on all ranks."""
    parents: Parents = ()
    """See ``StepProposal``."""
    draft_rows: int = 0
    """Number of draft rows among the decode rows."""
