"""The bytes of expert weights between two workers: a question, and one expert as the answer.

    asking                                      holding
    handshake (cluster token, checkpoint, configuration), then for every expert:
    u16 bank, u16 expert                  ->
                                          <-    u8 status, u64 length, 16 bytes checksum, the data

The data of an expert are its matrices [out, in] in the model's dtype, row-major, exchange by
exchange. The checksum covers bank, expert and data, so that neither a flipped bit nor the wrong
expert goes unnoticed. A status other than 0 brings a short reason instead. Nothing is unpickled,
and both sides know the length that an expert must have.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Final

import torch

from cluster.errors import ProtocolError
from workers.families.base import BankSpec

QUESTION: Final = struct.Struct("!HH")
"""Bank and expert."""
ANSWER: Final = struct.Struct("!BQ16s")
"""Status, length of what follows, checksum."""
HELD: Final = 0
REFUSED: Final = 1
CHUNK_BYTES: Final = 256 * 1024
"""Bytes between two looks at the rate limit and at whether to go on."""


def expert_shapes(bank: BankSpec) -> list[tuple[int, int, tuple[int, int]]]:
    """(exchange, matrix, [out, in]) of an expert's matrices, in the order of the wire."""
    return [
        (exchange.index, i, shape)
        for exchange in bank.exchanges
        for i, shape in enumerate(exchange.matrix_shapes)
    ]


def expert_num_bytes(bank: BankSpec, dtype: torch.dtype) -> int:
    """Bytes of one expert."""
    return sum(out * width for _, _, (out, width) in expert_shapes(bank)) * dtype.itemsize


def checksum(bank: int, expert: int, parts: Sequence[memoryview]) -> bytes:
    """16 bytes over an expert's identity and data."""
    digest = hashlib.blake2b(QUESTION.pack(bank, expert), digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()


def check_length(peer: str, found: int, expected: int) -> None:
    """Raises ``ProtocolError`` unless an answer is as long as it must be."""
    if found != expected:
        raise ProtocolError(f"{peer} announces {found} bytes of an expert: must be {expected}")
