"""Frames on an edge: a fixed header of 36 bytes, then a payload of bounded length.

A data frame (ROWS, OUTPUTS) carries one or two parts (tensors of rows), a part with 4-byte elements
first. The header has the number of rows of each. Step frames carry ``StepProposal`` or
``StepHeader``. All header fields are checked before the payload is read.
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
"""Payload limit of step frames, enough for a header of 65535 ranks."""


class FrameKind(IntEnum):
    PROPOSAL = 1
    """Attention rank -> leader."""
    HEADER = 2
    ROWS = 3
    """Attention rank -> expert rank: dispatch."""
    OUTPUTS = 4
    """Expert rank -> attention rank: combine."""


DATA_KINDS: Final = frozenset({FrameKind.ROWS, FrameKind.OUTPUTS})
EXACT: Final = 1
"""Flag: the step uses the exact split."""
PER_SLOT: Final = 2
"""Flag: the cluster combines in ``per_slot`` mode."""
_KINDS: Final = {int(kind): kind for kind in FrameKind}


class FrameHeader(NamedTuple):
    kind: FrameKind
    generation: int
    step: int
    flags: int = 0
    """Combination of ``EXACT`` and ``PER_SLOT``."""
    bank: int = 0
    """``BankSpec.index``, which also identifies the layer."""
    exchange: int = 0
    """``ExchangeSpec.index``."""
    micro_batch: int = 0
    """0 or 1."""
    counts: tuple[int, int] = (0, 0)
    """Number of rows of each part of a data frame."""
    length: int = 0
    """Size of the payload in bytes."""

    def encode(self) -> bytes:
        """Return the 36 bytes of the header."""
        return _HEADER.pack(MAGIC, VERSION, *self[:7], *self.counts, self.length)

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview, max_data_bytes: int) -> FrameHeader:
        """Inverse of ``encode``. Raises ``ProtocolError`` that names the invalid field."""
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
    """A complete received frame."""

    header: FrameHeader
    payload: NDArray[np.uint8]
    """Payload bytes, in memory that the frame owns."""


def max_data_bytes(
    banks: Sequence[BankSpec], max_rows: int, itemsize: int, combine_mode: CombineMode
) -> int:
    """Return the largest payload of a data frame: ``max_rows`` rows of one rank in any bank.

    ``itemsize``: size of the model dtype in bytes.
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
