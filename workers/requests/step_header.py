"""The step header and the proposals from which it is made.

After each step every attention rank proposes what it wants to run next; the leader (the lowest
attention rank) decides (``workers.engine.leader``) and publishes one header to all ranks.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from cluster.core.codec import Codec, Count, Message
from workers.requests.traced import MAX_TRACED, Parents

MAX_ROWS = 1 << 24
"""Rows that one rank can name in a proposal or be granted; no worker sends more."""
Rows = Annotated[int, Meta(ge=0, le=MAX_ROWS)]
Step = Annotated[int, Meta(ge=0)]
WHOLE = 1000
"""Shares are in thousandths: this one is all rows."""
Share = Annotated[int, Meta(ge=0, le=WHOLE)]


class StepProposal(Message, frozen=True, kw_only=True, array_like=True):
    """What one attention rank wants to run in one step."""

    generation: Count
    step: Step
    """A later proposal of a rank for the same step replaces the earlier one."""
    rank: Count
    decode_rows: Rows
    """Rows of sequences that lack only their newest output token, and of drafts."""
    prefill_rows: Rows
    edge_share: Share = 0
    """Largest share of its decode rows, in thousandths, that one expert rank needed of late; 0: not
    known, so none of its rows may be left out."""
    is_alone: bool = False
    """They are one request's, which must be in a step with no other."""
    parents: Parents = ()
    """Spans of the traced requests with rows in the step, below which its spans are."""
    draft_rows: Rows = 0
    """Of the decode rows those of drafts."""

    @property
    def num_rows(self) -> int:
        return self.decode_rows + self.prefill_rows


class Grant(Message, frozen=True, kw_only=True, array_like=True):
    """Rows that one attention rank runs in a step."""

    decode_rows: Rows = 0
    prefill_rows: Rows = 0
    draft_rows: Rows = 0
    """Of the decode rows those of drafts, as it proposed."""

    @property
    def num_rows(self) -> int:
        return self.decode_rows + self.prefill_rows

    @property
    def num_decodes(self) -> int:
        """Sequences that decode."""
        return self.decode_rows - self.draft_rows


_NO_GRANT = Grant()


class StepHeader(Message, frozen=True, kw_only=True, array_like=True):
    """The leader's decision on one step: the same on every rank."""

    generation: Count
    step: Step
    """Global step number: tags messages, grows over generations."""
    epoch: Count
    """Placement epoch that the step runs in."""
    oldest_epoch: Count
    """Oldest placement epoch that may still run; older weights may be overwritten."""
    grants: tuple[tuple[Count, Grant], ...]
    """(attention rank, rows) of all attention ranks, by rank."""
    num_micro_batches: Annotated[int, Meta(ge=1, le=2)] = 1
    """Micro-batch 0 of two takes the first ceil(n/2) rows of each rank."""
    exact: bool = False
    """True: edges carry only the rows that are needed; False: every edge carries all rows, or as
    many as ``edge_limit`` says."""
    edge_limit: Rows = 0
    """Where ``exact`` is False: rows of a micro-batch on an edge at most, needed ones first; 0: no
    limit."""
    bucket: Rows = 0
    """Where ``exact`` is False: a micro-batch with rows is filled up to so many on every rank, as
    it is in captured steps; 0: it is not."""
    is_alone: bool = False
    """The step has rows of one request only."""
    parents: tuple[tuple[Count, Parents], ...] = ()
    """(attention rank, spans below which those of its part are) of ranks that asked for spans."""

    def __post_init__(self) -> None:
        """Raises ``ValueError``, which the codec reports as a ``ProtocolError``."""
        ranks = [rank for rank, _ in self.grants]
        if not ranks or ranks != sorted(set(ranks)):
            raise ValueError("grants must name at least one rank and be sorted by rank")
        if any(grant.draft_rows > grant.decode_rows for _, grant in self.grants):
            raise ValueError("draft_rows must not exceed decode_rows")
        if self.oldest_epoch > self.epoch:
            raise ValueError("oldest_epoch must not exceed epoch")
        if self.exact and (self.edge_limit or self.bucket):
            raise ValueError("an exact step must have no edge_limit and no bucket")
        if self.bucket and any(self.rows(rank, 0) > self.bucket for rank in ranks):
            raise ValueError("bucket must hold the rows of every rank")
        if self.parents and sum(len(parents) for _, parents in self.parents) > MAX_TRACED:
            raise ValueError(f"parents must be at most {MAX_TRACED}")

    def grant(self, rank: int) -> Grant:
        """Rows of one attention rank; none for a rank that the header does not name."""
        for other, grant in self.grants:
            if other == rank:
                return grant
        return _NO_GRANT

    @property
    def decode_rows(self) -> int:
        """Decode rows of all ranks."""
        rows = 0
        for _, grant in self.grants:
            rows += grant.decode_rows
        return rows

    @property
    def prefill_rows(self) -> int:
        """Prompt rows of all ranks."""
        rows = 0
        for _, grant in self.grants:
            rows += grant.prefill_rows
        return rows

    @property
    def num_decodes(self) -> int:
        """Sequences of all ranks that decode."""
        return sum(grant.num_decodes for _, grant in self.grants)

    def rows(self, rank: int, micro_batch: int) -> int:
        """Rows of one attention rank in one micro-batch."""
        total = self.grant(rank).num_rows
        first = total if self.num_micro_batches == 1 else -(-total // 2)
        return first if micro_batch == 0 else total - first

    def edge_rows(self, rank: int, micro_batch: int) -> int:
        """Rows of one micro-batch that an attention rank sends each expert rank; in an exact step,
        the most that it may send."""
        rows = self.rows(rank, micro_batch)
        if rows and self.bucket:
            rows = self.bucket
        return min(rows, self.edge_limit) if self.edge_limit else rows


PROPOSALS: Codec[StepProposal] = Codec(StepProposal, "a step proposal")
HEADERS: Codec[StepHeader] = Codec(StepHeader, "a step header")
