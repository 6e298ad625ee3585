"""Messages that decide a step: proposals of the attention ranks, and the leader's step header.

After each step, every attention rank proposes the rows that it wants to run next. The leader (the
lowest attention rank) decides (``workers.engine.leader``) and sends one header to all ranks.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from cluster.core.codec import Codec, Count, Message
from workers.requests.traced import MAX_TRACED, Parents

MAX_ROWS = 1 << 24
"""Maximum number of rows that a rank can propose or be granted."""
MAX_MICRO_BATCHES = 2
"""Maximum number of micro-batches of a step."""
Rows = Annotated[int, Meta(ge=0, le=MAX_ROWS)]
Step = Annotated[int, Meta(ge=0)]
ALL_ROWS = 1000
"""Value of a share that means all rows: shares are integers, in thousandths."""
Share = Annotated[int, Meta(ge=0, le=ALL_ROWS)]


class StepProposal(Message, frozen=True, kw_only=True, array_like=True):
    """Proposal of one attention rank to the leader: the rows that it wants to run in a step."""

    generation: Count
    step: Step
    """Number of the step. A later proposal of a rank for the same step replaces an earlier one."""
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

    @property
    def num_rows(self) -> int:
        return self.decode_rows + self.prefill_rows


class Grant(Message, frozen=True, kw_only=True, array_like=True):
    """Numbers of rows that the leader allows one attention rank to run in a step."""

    decode_rows: Rows = 0
    prefill_rows: Rows = 0
    draft_rows: Rows = 0
    """Number of draft rows among the decode rows, equal to the number in the rank's proposal."""

    @property
    def num_rows(self) -> int:
        return self.decode_rows + self.prefill_rows

    @property
    def num_decodes(self) -> int:
        """Number of decode rows without draft rows: one for each decoding sequence."""
        return self.decode_rows - self.draft_rows


_NO_GRANT = Grant()


class StepHeader(Message, frozen=True, kw_only=True, array_like=True):
    """The leader's message to all ranks about one step: rows, placement epoch and message sizes."""

    generation: Count
    step: Step
    """Global step number, which tags messages and keeps increasing when the generation changes."""
    epoch: Count
    """Placement epoch of the step (version of the expert placement that all ranks use)."""
    oldest_epoch: Count
    """Oldest placement epoch that later steps may use. Expert slots of older epochs may be
    overwritten."""
    grants: tuple[tuple[Count, Grant], ...]
    """Rows of each attention rank, as (rank, grant) in ascending order of all ranks."""
    num_micro_batches: Annotated[int, Meta(ge=1, le=MAX_MICRO_BATCHES)] = 1
    """Number of micro-batches. Of two, the first has ceil(n/2) of each rank's n rows."""
    exact: bool = False
    """Whether each expert rank receives exactly the rows with an expert on it. If not, it receives
    all rows of each attention rank, or ``edge_limit`` rows."""
    edge_limit: Rows = 0
    """Maximum number of rows of a micro-batch that an attention rank sends to an expert rank,
    needed rows first; 0 for no limit, as always if ``exact``."""
    bucket: Rows = 0
    """Number of rows to which each attention rank, also one without rows, pads every micro-batch,
    so that captured steps (CUDA graphs) do not depend on which ranks have rows; 0 for no padding,
    as always if ``exact``."""
    is_alone: bool = False
    """Whether only one request has rows in the step."""
    parents: tuple[tuple[Count, Parents], ...] = ()
    """Parent trace spans for the spans of the step, as (attention rank, spans) for the ranks that
    have traced requests."""

    def __post_init__(self) -> None:
        """Check the fields. Raises ``ValueError``, which the codec turns into ``ProtocolError``."""
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
        """Return the grant of one attention rank; an empty grant if the header has no such rank."""
        for other, grant in self.grants:
            if other == rank:
                return grant
        return _NO_GRANT

    @property
    def decode_rows(self) -> int:
        """Number of decode rows of all ranks."""
        rows = 0
        for _, grant in self.grants:
            rows += grant.decode_rows
        return rows

    @property
    def prefill_rows(self) -> int:
        """Number of prompt rows of all ranks."""
        rows = 0
        for _, grant in self.grants:
            rows += grant.prefill_rows
        return rows

    @property
    def num_decodes(self) -> int:
        """Number of decode rows of all ranks without draft rows: one for each decoding sequence."""
        return sum(grant.num_decodes for _, grant in self.grants)

    def rows(self, rank: int, micro_batch: int) -> int:
        """Return the number of rows of one attention rank in one micro-batch (0 or 1)."""
        total = self.grant(rank).num_rows
        first = total if self.num_micro_batches == 1 else -(-total // 2)
        return first if micro_batch == 0 else total - first

    def edge_rows(self, rank: int, micro_batch: int) -> int:
        """Return the number of rows that an attention rank sends to each expert rank, in one
        micro-batch, with padding. If ``exact``, it is the maximum number.
        """
        rows = self.bucket or self.rows(rank, micro_batch)
        return min(rows, self.edge_limit) if self.edge_limit else rows


PROPOSALS: Codec[StepProposal] = Codec(StepProposal, "a step proposal")
HEADERS: Codec[StepHeader] = Codec(StepHeader, "a step header")
