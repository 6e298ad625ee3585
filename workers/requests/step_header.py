"""The leader's message to all ranks about a step: the rows that each attention rank may run.

After each step, every attention rank proposes the rows that it wants to run next
(``workers.engine.step_proposals``). The leader (the lowest attention rank of the step group)
decides (``workers.engine.leader``), and its header reaches all ranks.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from operator import add, sub
from struct import Struct
from types import MappingProxyType
from typing import Annotated, Final, Self

from msgspec import Meta

from cluster.core.codec import Codec, Count, Message
from workers.requests.traced import MAX_TRACED, Parents

MAX_ROWS = 1 << 24
"""Maximum number of rows that a rank can propose or be granted."""
MAX_RANKS = 1 << 15
"""Maximum number of attention ranks."""
MAX_MICRO_BATCHES = 2
"""Maximum number of micro-batches of a step."""
Rows = Annotated[int, Meta(ge=0, le=MAX_ROWS)]
Step = Annotated[int, Meta(ge=0)]
ALL_ROWS = 1000
"""Value of a share that means all rows: shares are integers, in thousandths."""
_KIND: Final = "I"
"""Type code of the packed numbers: unsigned 32-bit integers."""
_NUMBER = Struct(_KIND)
_SIZE = _NUMBER.size
_HIGHEST = _SIZE - 1 if sys.byteorder == "little" else 0
"""Index of the byte of a number that is 0 for all numbers below ``MAX_ROWS``."""


class Grant(Message, frozen=True, kw_only=True):
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


class Grants(Message, frozen=True, kw_only=True, array_like=True, dict=True):
    """Grants of all attention ranks, as packed 32-bit integers in the byte order of the hosts.

    A rank unpacks only its own grant, so that the cost of a header barely depends on the number of
    ranks. Iteration yields (rank, grant) pairs in ascending order of the ranks.
    """

    ranks: Annotated[bytes, Meta(max_length=_SIZE * MAX_RANKS)]
    """Attention ranks in ascending order."""
    numbers: bytes
    """Decode rows of all ranks, then their prompt rows, then their draft rows."""
    totals: Grant
    """The sums of the grants of all ranks."""

    @classmethod
    def of(cls, grants: Mapping[int, Grant]) -> Self:
        """Return the grants of these ranks."""
        each = [grants[rank] for rank in sorted(grants)]
        rows = [g.decode_rows for g in each], [g.prefill_rows for g in each]
        return cls.of_rows(pack(sorted(grants)), *rows, [g.draft_rows for g in each])

    @classmethod
    def of_rows(
        cls,
        ranks: bytes,
        decode_rows: Sequence[int],
        prefill_rows: Sequence[int],
        draft_rows: Sequence[int],
    ) -> Self:
        """Return the grants of packed ``ranks`` from the numbers of rows of each."""
        columns = (decode_rows, prefill_rows, draft_rows)
        sums = dict(zip(Grant.__struct_fields__, map(sum, columns), strict=True))
        return cls(ranks=ranks, numbers=b"".join(map(pack, columns)), totals=Grant(**sums))

    def __post_init__(self) -> None:
        """Check the fields. Raises ``ValueError``, which the codec turns into ``ProtocolError``."""
        positions_of(self.ranks)
        if len(self.numbers) != 3 * len(self.ranks):
            raise ValueError("numbers must be 3 for each rank")
        # Each header of each rank is checked: usually, the highest bytes and all drafts are 0.
        highest, drafts = self.numbers[_HIGHEST::_SIZE], self.numbers[2 * len(self.ranks) :]
        if highest != bytes(len(highest)) and (most := max(self._unpacked)) > MAX_ROWS:
            raise ValueError(f"rows are {most}, must be <= {MAX_ROWS}")
        has_drafts = drafts != bytes(len(drafts))
        if has_drafts and any(map(int.__gt__, memoryview(drafts).cast(_KIND), self._unpacked)):
            raise ValueError("draft_rows must not exceed decode_rows")

    def __iter__(self) -> Iterator[tuple[int, Grant]]:
        return ((rank, self.of_rank(rank)) for rank in self.positions)

    @property
    def positions(self) -> Mapping[int, int]:
        """Position of each rank, in ascending order of the ranks."""
        return positions_of(self.ranks)

    def of_rank(self, rank: int) -> Grant:
        """Return the grant of one attention rank; an empty grant for an unknown rank."""
        position = positions_of(self.ranks).get(rank)
        if position is None:
            return _NO_GRANT
        numbers, column, first = self.numbers, len(self.ranks), _SIZE * position
        (decode_rows,) = _NUMBER.unpack_from(numbers, first)
        (prefill_rows,) = _NUMBER.unpack_from(numbers, column + first)
        (draft_rows,) = _NUMBER.unpack_from(numbers, 2 * column + first)
        return Grant(decode_rows=decode_rows, prefill_rows=prefill_rows, draft_rows=draft_rows)

    @cached_property
    def rows(self) -> Sequence[int]:
        """Number of rows of each rank, in ascending order of the ranks."""
        numbers, length = self._unpacked, len(self.ranks) // _SIZE
        return tuple(map(add, numbers[:length], numbers[length : 2 * length]))

    @property
    def _unpacked(self) -> memoryview[int]:
        return memoryview(self.numbers).cast(_KIND)


def pack(numbers: Sequence[int]) -> bytes:
    """Return numbers as 32-bit integers. Raises ``OverflowError`` if one does not fit."""
    return array(_KIND, numbers).tobytes()


@lru_cache(maxsize=64)
def positions_of(ranks: bytes) -> Mapping[int, int]:
    """Return the position of each packed rank. Raises ``ValueError`` if they are not in order."""
    found = list(memoryview(ranks).cast(_KIND)) if len(ranks) % _SIZE == 0 else []
    if not found or found != sorted(set(found)):
        raise ValueError("grants must name at least one rank and be sorted by rank")
    return MappingProxyType({rank: position for position, rank in enumerate(found)})


class StepHeader(Message, frozen=True, kw_only=True, array_like=True):
    """The leader's message to all ranks about one step: rows, placement epoch and message sizes."""

    generation: Count
    step: Step
    """Step number, which tags messages and keeps increasing when the generation changes. Each step
    group numbers its own steps."""
    epoch: Count
    """Placement epoch of the step (version of the expert placement that all ranks use)."""
    oldest_epoch: Count
    """Oldest placement epoch that later steps may use. Expert slots of older epochs may be
    overwritten."""
    grants: Grants
    """Rows of each attention rank."""
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
        if self.oldest_epoch > self.epoch:
            raise ValueError("oldest_epoch must not exceed epoch")
        if self.exact and (self.edge_limit or self.bucket):
            raise ValueError("an exact step must have no edge_limit and no bucket")
        if self.bucket and max(self._first_rows) > self.bucket:
            raise ValueError("bucket must hold the rows of every rank")
        if self.parents and sum(len(parents) for _, parents in self.parents) > MAX_TRACED:
            raise ValueError(f"parents must be at most {MAX_TRACED}")

    def grant(self, rank: int) -> Grant:
        """Return the grant of one attention rank; an empty grant if the header has no such rank."""
        return self.grants.of_rank(rank)

    @property
    def decode_rows(self) -> int:
        """Number of decode rows of all ranks."""
        return self.grants.totals.decode_rows

    @property
    def prefill_rows(self) -> int:
        """Number of prompt rows of all ranks."""
        return self.grants.totals.prefill_rows

    @property
    def num_decodes(self) -> int:
        """Number of decode rows of all ranks without draft rows: one for each decoding sequence."""
        return self.grants.totals.num_decodes

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

    def edge_counts(self, micro_batch: int) -> Sequence[int]:
        """Return ``edge_rows`` of all attention ranks, in ascending order of the ranks."""
        most = self.edge_limit or MAX_ROWS
        if self.bucket:
            return [min(self.bucket, most)] * len(self.grants.rows)
        first = self._first_rows
        rows = first if micro_batch == 0 else list(map(sub, self.grants.rows, first))
        return [min(n, most) for n in rows] if self.edge_limit else rows

    @property
    def _first_rows(self) -> Sequence[int]:
        rows = self.grants.rows
        return rows if self.num_micro_batches == 1 else [(n + 1) // 2 for n in rows]


HEADERS: Codec[StepHeader] = Codec(StepHeader, "a step header")
