"""The rows of a step: as a worker wants them, and as planned after the leader's grant. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from msgspec import Struct

from workers.kv.state_slots import StateMove
from workers.requests.sequence import SequenceState, SequenceStatus
from workers.requests.traced import Parents


class PlannedRows(Struct, frozen=True):
    """Consecutive rows of one sequence in a plan. Their KV blocks are already allocated."""

    sequence: SequenceState
    first: int
    count: int
    is_decode: bool
    """Whether the rows are one decode row, followed by one row for each of ``drafts``."""
    num_new_blocks: int
    """Number of KV blocks that the plan allocated for the rows; unused if ``is_admitted``."""
    is_admitted: bool
    """Whether the plan admitted the sequence, which waited before."""
    states: StateMove | None = None
    """Recurrent states that the rows read and write; None if the model has no such states."""
    drafts: tuple[int, ...] = ()
    """Draft tokens (guesses of the next tokens), one for each of the last rows."""

    @property
    def samples_token(self) -> bool:
        """Whether the rows include the newest token, so that the next token can be sampled."""
        return self.first + self.count - len(self.drafts) == self.sequence.num_tokens

    def split_by_row(self) -> Iterator[PlannedRows]:
        """Yield each row of an entry with drafts as a separate decode entry, for the model."""
        for row in range(self.count):
            first = row + len(self.drafts) - self.count
            drafts = self.drafts[first : first + 1] if first >= 0 else ()
            yield PlannedRows(self.sequence, self.first + row, 1, True, 0, False, drafts=drafts)


def single_rows(planned: Sequence[PlannedRows]) -> Sequence[PlannedRows]:
    """Return plan entries for the model: an entry with drafts is split into one entry per row."""
    if not any(rows.drafts for rows in planned):
        return planned
    return [one for rows in planned for one in (rows.split_by_row() if rows.drafts else (rows,))]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The rows that a worker runs in one step."""

    rows: tuple[PlannedRows, ...]
    """Decodes by ``SequenceState.order``, then prompt rows in the order in which tenants take
    turns."""

    @property
    def num_rows(self) -> int:
        return sum(r.count for r in self.rows)

    @property
    def request_ids(self) -> dict[str, None]:
        """Ids of the requests that have rows, without duplicates, in the order of the rows."""
        return dict.fromkeys(r.sequence.request.request_id for r in self.rows)

    @property
    def running(self) -> StepPlan:
        """The rows of sequences that run; others have ended, or were preempted, since the plan."""
        rows = tuple(r for r in self.rows if r.sequence.status is SequenceStatus.RUNNING)
        return self if len(rows) == len(self.rows) else StepPlan(rows)

    def cache_slots(self, block_size: int) -> list[int]:
        """Return the KV cache slot (block * block_size + offset) of each row."""
        return [
            planned.sequence.blocks[position // block_size] * block_size + position % block_size
            for planned in self.rows
            for position in range(planned.first, planned.first + planned.count)
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBudget:
    """Limits of the rows and sequences in a step of one worker."""

    max_num_seqs: int
    """Maximum number of running sequences."""
    max_rows: int
    """Maximum number of rows, prompts and decodes together."""
    max_decode_rows: int
    """Maximum number of decode rows, including drafts."""


@dataclass(frozen=True, slots=True)
class RowsWanted:
    """Numbers of rows that a worker could run in the next step, for its proposal to the leader."""

    decode_rows: int = 0
    """Number of decode rows: one for each decoding sequence, and the draft rows."""
    prefill_rows: int = 0
    """Number of prompt rows within the token budget."""
    edge_share: int = 0
    """In thousandths, the largest share of the worker's decode rows that one expert rank needed in
    recent steps; 0 if unknown."""
    is_alone: bool = False
    """Whether the rows belong to a request that must run alone in the step, on all ranks."""
    parents: Parents = ()
    """Parent trace spans for the spans of the step, from traced requests that have rows in it."""
    draft_rows: int = 0
    """Number of draft rows among the decode rows."""
