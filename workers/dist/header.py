"""The step header and the leader's policy: who may run how many rows in which step.

After each step every attention rank proposes what it wants for the next one; the leader (the
lowest attention rank) decides alone and publishes one header to all ranks. This module is pure:
values in, values out, and a fixed binary form (big-endian) for the wire.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from cluster.errors import ProtocolError
from workers.dist.micro_batches import MicroBatchRule

_PROPOSAL: Final = struct.Struct("!IQHIIB")
_HEADER: Final = struct.Struct("!IQIIBBHIH")
_GRANT: Final = struct.Struct("!HII")
ALONE: Final = 1
"""Flag of a header: the step has rows of one request only."""
MAX_ROWS: Final = 1 << 24
"""Rows that one rank can name in a proposal or be granted; more is not one of ours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepProposal:
    """What one attention rank wants to run in one step."""

    generation: int
    """Generation it speaks of."""
    step: int
    """Step it is for; a later proposal for the same step replaces this one."""
    rank: int
    """Attention rank."""
    decode_rows: int
    """Rows of running sequences, one token each."""
    prefill_rows: int
    """Prompt rows it could run."""
    is_alone: bool = False
    """They are one request's, which must be in a step with no other."""

    def encode(self) -> bytes:
        """Fixed binary form."""
        return _PROPOSAL.pack(
            self.generation,
            self.step,
            self.rank,
            self.decode_rows,
            self.prefill_rows,
            self.is_alone,
        )

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview) -> StepProposal:
        """Inverse of ``encode``. Raises ``ProtocolError`` on a wrong length or value."""
        _check_length("step proposal", data, _PROPOSAL.size)
        generation, step, rank, decode_rows, prefill_rows, is_alone = _PROPOSAL.unpack(data)
        if is_alone not in (0, 1):
            raise ProtocolError("step proposal: is_alone must be 0 or 1")
        _check_rows("step proposal", decode_rows, prefill_rows)
        return cls(
            generation=generation,
            step=step,
            rank=rank,
            decode_rows=decode_rows,
            prefill_rows=prefill_rows,
            is_alone=bool(is_alone),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """Rows that one attention rank runs in a step."""

    decode_rows: int = 0
    """Rows of running sequences."""
    prefill_rows: int = 0
    """Prompt rows."""

    @property
    def num_rows(self) -> int:
        """All rows."""
        return self.decode_rows + self.prefill_rows


_NO_GRANT = Grant()
_ONE_MICRO_BATCH = MicroBatchRule()


@dataclass(frozen=True, kw_only=True, slots=True)
class StepHeader:
    """The leader's decision on one step: the same on every rank."""

    generation: int
    """Generation of the step."""
    step: int
    """Global step number: tags messages, grows over generations."""
    epoch: int
    """Placement epoch that the step runs in."""
    oldest_epoch: int
    """Oldest placement epoch that may still run; older weights may be overwritten."""
    grants: tuple[tuple[int, Grant], ...]
    """(attention rank, rows) of all attention ranks, by rank."""
    num_micro_batches: int = 1
    """1 or 2; micro-batch 0 takes the first ceil(n/2) rows of each rank."""
    exact: bool = False
    """True: edges carry only the rows that are needed; False: every edge carries all rows."""
    bucket: int = 1
    """Next power of two of the most rows of any rank: the shape of a captured graph."""
    flags: int = 0
    """0, or ``ALONE``."""

    @property
    def is_alone(self) -> bool:
        """The step has rows of one request only."""
        return self.flags == ALONE

    def grant(self, rank: int) -> Grant:
        """Rows of one attention rank; none for a rank that the header does not name."""
        return next((g for r, g in self.grants if r == rank), _NO_GRANT)

    @property
    def decode_rows(self) -> int:
        """Decode rows of all ranks."""
        return sum(g.decode_rows for _, g in self.grants)

    @property
    def prefill_rows(self) -> int:
        """Prompt rows of all ranks."""
        return sum(g.prefill_rows for _, g in self.grants)

    def rows(self, rank: int, micro_batch: int) -> int:
        """Rows of one attention rank in one micro-batch."""
        total = self.grant(rank).num_rows
        first = total if self.num_micro_batches == 1 else -(-total // 2)
        return first if micro_batch == 0 else total - first

    def encode(self) -> bytes:
        """Fixed binary form."""
        head = _HEADER.pack(
            self.generation,
            self.step,
            self.epoch,
            self.oldest_epoch,
            self.num_micro_batches,
            self.exact,
            self.flags,
            self.bucket,
            len(self.grants),
        )
        grants = (_GRANT.pack(r, g.decode_rows, g.prefill_rows) for r, g in self.grants)
        return head + b"".join(grants)

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview) -> StepHeader:
        """Inverse of ``encode``. Raises ``ProtocolError`` on a wrong length or value."""
        if len(data) < _HEADER.size:
            raise ProtocolError(f"step header of {len(data)} bytes: at least {_HEADER.size}")
        fields = _HEADER.unpack(data[: _HEADER.size])
        generation, step, epoch, oldest, num_micro_batches, exact, flags, bucket, count = fields
        _check_length("step header", data, _HEADER.size + count * _GRANT.size)
        grants = tuple(
            (rank, Grant(decode_rows=d, prefill_rows=p))
            for rank, d, p in _GRANT.iter_unpack(data[_HEADER.size :])
        )
        header = cls(
            generation=generation,
            step=step,
            epoch=epoch,
            oldest_epoch=oldest,
            grants=grants,
            num_micro_batches=num_micro_batches,
            exact=bool(exact),
            bucket=bucket,
            flags=flags,
        )
        _check_header(header, exact)
        return header


def decide_header(
    proposals: Mapping[int, StepProposal],
    *,
    ranks: Iterable[int],
    generation: int,
    step: int,
    epoch: int,
    oldest_epoch: int,
    max_prefill_rows: int,
    micro_batches: MicroBatchRule = _ONE_MICRO_BATCH,
    even_empty: bool = False,
) -> StepHeader | None:
    """The leader's policy: the header of ``step``, or None as long as there is nothing to run
    (unless ``even_empty``: then a step without rows runs).

    ``proposals`` by attention rank, ``ranks`` are all attention ranks of the generation. Decode
    rows are always granted. Prefill rows are capped at ``max_prefill_rows`` over all ranks; among
    those that want some, the first to be served moves on with the step number, so that none
    starves. The rule ``micro_batches`` sees what was granted. A proposal that must be alone gets the
    step for itself; of several the first to be served moves on in the same way.

        4 ranks want 300 prefill rows each, cap 512, step 6: rank 2 gets 300, rank 3 gets 212
    """
    order = sorted(ranks)
    if any(rank not in proposals for rank in order):
        return None
    wanted = any(proposals[r].decode_rows or proposals[r].prefill_rows for r in order)
    if not wanted and not even_empty:
        return None
    alone = [r for r in order if proposals[r].is_alone and _num_rows(proposals[r])]
    if alone:
        chosen = alone[step % len(alone)]
        proposals = {r: proposals[r] if r == chosen else _nothing(proposals[r]) for r in order}
    left = max_prefill_rows
    prefill = dict.fromkeys(order, 0)
    wanting = [rank for rank in order if proposals[rank].prefill_rows]
    for i in range(len(wanting)):
        rank = wanting[(step + i) % len(wanting)]
        prefill[rank] = min(proposals[rank].prefill_rows, left)
        left -= prefill[rank]
    grants = tuple(
        (r, Grant(decode_rows=proposals[r].decode_rows, prefill_rows=prefill[r])) for r in order
    )
    rows = [g.num_rows for _, g in grants]
    has_prefill = any(g.prefill_rows for _, g in grants)
    return StepHeader(
        generation=generation,
        step=step,
        epoch=epoch,
        oldest_epoch=oldest_epoch,
        grants=grants,
        num_micro_batches=micro_batches.choose(rows, has_prefill),
        exact=has_prefill,
        bucket=bucket_of(max(rows)),
        flags=ALONE if alone else 0,
    )


def _num_rows(proposal: StepProposal) -> int:
    return proposal.decode_rows + proposal.prefill_rows


def _nothing(proposal: StepProposal) -> StepProposal:
    return replace(proposal, decode_rows=0, prefill_rows=0)


def bucket_of(num_rows: int) -> int:
    """Next power of two, 1 for no rows."""
    return 1 << max(num_rows - 1, 0).bit_length()


def _check_length(what: str, data: bytes | bytearray | memoryview, length: int) -> None:
    if len(data) != length:
        raise ProtocolError(f"{what} of {len(data)} bytes: must be {length}")


def _check_rows(what: str, *counts: int) -> None:
    for rows in counts:
        if rows > MAX_ROWS:
            raise ProtocolError(f"{what} names {rows} rows: at most {MAX_ROWS}")


def _check_header(header: StepHeader, exact: int) -> None:
    ranks = [rank for rank, _ in header.grants]
    most = 0
    for _, grant in header.grants:
        _check_rows("step header", grant.decode_rows, grant.prefill_rows)
        most = max(most, grant.num_rows)
    rules = (
        (bool(ranks), "grants must name a rank"),
        (ranks == sorted(set(ranks)), "grants must be sorted by rank"),
        (header.num_micro_batches in (1, 2), "num_micro_batches must be 1 or 2"),
        (exact in (0, 1), "exact must be 0 or 1"),
        (header.flags in (0, ALONE), f"flags must be 0 or {ALONE}"),
        (header.oldest_epoch <= header.epoch, "oldest_epoch must not exceed epoch"),
        (header.bucket == bucket_of(most), f"bucket must be {bucket_of(most)}"),
    )
    for ok, rule in rules:
        if not ok:
            raise ProtocolError(f"step header {header.step}: {rule}")
