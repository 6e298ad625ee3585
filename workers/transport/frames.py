"""Frames on an edge: a fixed header of 36 bytes, then a payload of bounded length.

A data frame (ROWS, OUTPUTS) carries one or two parts (tensors of rows), a part with 4-byte elements
first. The header has the number of rows of each part. Step frames (PROPOSAL, HEADER) carry
``StepProposals`` or ``StepHeader``. All header fields are checked before the payload is read.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster.config.cluster import CombineMode
from cluster.core.errors import ProtocolError
from workers.model.config import BankSpec

MAGIC: Final = b"EMdp"
VERSION: Final = 1
_HEADER: Final = struct.Struct("!4sBBIQBHBBIIIx")
HEADER_BYTES: Final = _HEADER.size
MAX_STEP_FRAME_BYTES: Final = 1 << 20
"""Maximum payload in bytes of a frame with step proposals or a header, enough for 32768 ranks."""


class FrameKind(IntEnum):
    PROPOSAL = 1
    """Step proposals of attention ranks, on the way to the leader."""
    HEADER = 2
    ROWS = 3
    """Rows of an attention rank to an expert rank (dispatch)."""
    OUTPUTS = 4
    """Outputs of an expert rank to an attention rank (combine)."""


DATA_KINDS: Final = frozenset({FrameKind.ROWS, FrameKind.OUTPUTS})
EXACT: Final = 1
"""Flag of a frame: the step is exact, so that edges carry only the needed rows."""
PER_SLOT: Final = 2
"""Flag of a frame: the combine mode is ``per_slot``, with one output for each row and expert."""
_KINDS: Final = {int(kind): kind for kind in FrameKind}


class FrameHeader(NamedTuple):
    kind: FrameKind
    generation: int
    step: int
    flags: int = 0
    """Bitwise combination of the flags ``EXACT`` and ``PER_SLOT``."""
    bank: int = 0
    """Index of the expert bank (``BankSpec.index``), which also identifies the layer."""
    exchange: int = 0
    """Index of the exchange in its bank (``ExchangeSpec.index``)."""
    micro_batch: int = 0
    """Index of the micro-batch, 0 or 1."""
    counts: tuple[int, int] = (0, 0)
    """Number of rows of each of the two parts of a data frame; 0 for a part that is missing."""
    length: int = 0
    """Size of the frame's payload in bytes."""

    def encode(self) -> bytes:
        """Return the header as 36 bytes."""
        return _HEADER.pack(MAGIC, VERSION, *self[:7], *self.counts, self.length)

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview, max_data_bytes: int) -> FrameHeader:
        """Decode the 36 bytes of a header. ``max_data_bytes``: limit of a data frame's payload.

        Raises ``ProtocolError``, which names the invalid field.
        """
        fields = _HEADER.unpack(data)
        magic, version, number, generation, step, flags = fields[:6]
        bank, exchange, micro_batch, first, second, length = fields[6:]
        if magic != MAGIC:
            raise ProtocolError(f"frame magic {magic!r}: must be {MAGIC!r}")
        if version != VERSION:
            raise ProtocolError(f"frame version {version}: must be {VERSION}")
        kind = _KINDS.get(number)
        if kind is None:
            raise ProtocolError(f"frame kind {number} is unknown")
        if flags & ~(EXACT | PER_SLOT):
            raise ProtocolError(f"frame flags {flags:#x} are unknown")
        if micro_batch > 1:
            raise ProtocolError(f"frame micro-batch {micro_batch}: must be 0 or 1")
        limit = max_data_bytes if kind in DATA_KINDS else MAX_STEP_FRAME_BYTES
        if length > limit:
            raise ProtocolError(f"frame of {length} bytes: at most {limit}")
        counts = (first, second)
        return cls(kind, generation, step, flags, bank, exchange, micro_batch, counts, length)


class Frame(NamedTuple):
    """A frame that was received completely."""

    header: FrameHeader
    payload: NDArray[np.uint8]
    """Payload bytes, in memory that the frame owns."""


def max_data_bytes(
    banks: Sequence[BankSpec], max_rows: int, itemsize: int, combine_mode: CombineMode
) -> int:
    """Return the largest payload of a data frame in bytes: ``max_rows`` rows, in any bank.

    ``max_rows``: maximum rows of one rank in a step. ``itemsize``: bytes of the model dtype.
    """
    largest = 0
    for bank in banks:
        for exchange in bank.exchanges:
            inputs = bank.top_k if exchange.per_slot_input else 1
            rows = 8 * bank.top_k + inputs * exchange.in_width * itemsize
            by_pair = exchange.returns_pairs(combine_mode)
            row_bytes = bank.top_k * itemsize if by_pair else 4
            largest = max(largest, rows, exchange.out_width * row_bytes)
    return max_rows * largest
