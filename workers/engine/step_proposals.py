"""Proposals of attention ranks to the leader: the rows that they want to run in the next step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

from msgspec import Meta

from cluster.core.codec import Codec, Count, Message
from workers.requests.step_header import ALL_ROWS, Rows, Step, pack
from workers.requests.traced import Parents
from workers.scheduling.step_plan import RowsWanted

Share = Annotated[int, Meta(ge=0, le=ALL_ROWS)]


class StepProposal(Message, frozen=True, kw_only=True, array_like=True):
    """Rows that one attention rank wants to run in a step."""

    rank: Count
    decode_rows: Rows
    """Number of decode rows: one for each decoding sequence, and the draft rows."""
    prefill_rows: Rows
    edge_share: Share = 0
    """Largest share of the proposing rank's decode rows, in thousandths, that one expert rank
    needed in recent steps; 0 if unknown, in which case all rows must be sent to all expert ranks.
    """
    is_alone: bool = False
    """Whether the rows belong to a request that must run alone in the step."""
    parents: Parents = ()
    """Parent trace spans for the spans of the step, from traced requests that have rows in it."""
    draft_rows: Rows = 0
    """Number of draft rows among the decode rows."""

    def __post_init__(self) -> None:
        if self.draft_rows > self.decode_rows:
            raise ValueError("draft_rows must not exceed decode_rows")

    @classmethod
    def of(cls, rank: int, rows: RowsWanted) -> StepProposal:
        """Return the proposal of ``rank`` for the rows that it wants."""
        return cls(
            rank=rank,
            decode_rows=rows.decode_rows,
            prefill_rows=rows.prefill_rows,
            edge_share=rows.edge_share,
            is_alone=rows.is_alone,
            parents=rows.parents,
            draft_rows=rows.draft_rows,
        )

    @property
    def num_rows(self) -> int:
        return self.decode_rows + self.prefill_rows


class StepProposals(Message, frozen=True, kw_only=True, array_like=True):
    """Newest proposals of one or more attention ranks for a step. Later ones replace them."""

    generation: Count
    step: Step
    """Number of the step."""
    proposals: tuple[StepProposal, ...]
    is_settled: bool = True
    """Whether the hosts of all workers below the sender have received the header before."""


class ProposalTable:
    """The newest proposals of a set of attention ranks for the next step."""

    def __init__(self, ranks: Sequence[int]) -> None:
        """``ranks``: the attention ranks that must propose, in ascending order."""
        self.ranks = tuple(ranks)
        self.packed_ranks = pack(self.ranks)
        self._proposals: dict[int, StepProposal] = {}

    @property
    def is_complete(self) -> bool:
        """Whether all ranks have proposed."""
        return len(self._proposals) == len(self.ranks)

    @property
    def in_order(self) -> list[StepProposal]:
        """The proposals by ascending rank."""
        known = self._proposals
        ranks = self.ranks if self.is_complete else [r for r in self.ranks if r in known]
        return [*map(known.__getitem__, ranks)]

    def missing(self) -> list[int]:
        """Return the ranks that have not proposed."""
        return [] if self.is_complete else [r for r in self.ranks if r not in self._proposals]

    def put(self, proposals: Iterable[StepProposal]) -> bool:
        """Set the proposals of some of these ranks, in place of earlier ones.

        Returns whether any of them has changed.
        """
        has_changed = False
        for proposal in proposals:
            has_changed = has_changed or self._proposals.get(proposal.rank) != proposal
            self._proposals[proposal.rank] = proposal
        return has_changed

    def clear(self) -> None:
        """Drop all proposals, which were for a step that was decided."""
        self._proposals.clear()


PROPOSALS: Codec[StepProposals] = Codec(StepProposals, "a step proposal")
