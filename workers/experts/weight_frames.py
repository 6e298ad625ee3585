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
import socket
import struct
import time
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from cluster.errors import PeerLostError, ProtocolError
from workers.dist.handshake import ConnectorHandshake, ListenerHandshake
from workers.families.base import BankSpec

QUESTION: Final = struct.Struct("!HH")
"""Bank and expert."""
ANSWER: Final = struct.Struct("!BQ16s")
"""Status, length of what follows, checksum."""
HELD: Final = 0
REFUSED: Final = 1
MAX_REASON_BYTES: Final = 1024
CHUNK_BYTES: Final = 256 * 1024
"""Bytes between two looks at the rate limit and at whether to go on."""
_READ_BYTES = 4096


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


def view_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy."""
    return tensor.view(torch.uint8).flatten().numpy().data


def checksum(bank: int, expert: int, parts: Sequence[memoryview]) -> bytes:
    """16 bytes over an expert's identity and data."""
    digest = hashlib.blake2b(QUESTION.pack(bank, expert), digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()


def shake_hands(
    sock: socket.socket, handshake: ConnectorHandshake | ListenerHandshake, timeout_s: float
) -> None:
    """Run a handshake on a blocking socket.

    Raises ``HandshakeError`` when the peer is not one of ours, ``OSError`` when it is gone or slow.
    """
    deadline = time.monotonic() + timeout_s
    if isinstance(handshake, ConnectorHandshake):
        sock.sendall(handshake.start())
    while not handshake.done:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the handshake was not finished in time")
        sock.settimeout(left)
        data = sock.recv(_READ_BYTES)
        if not data:
            raise ConnectionError("closed the connection during the handshake")
        answer = handshake.feed(data)
        if answer:
            sock.sendall(answer)


def receive_exactly(sock: socket.socket, view: memoryview) -> None:
    """Fill ``view``. Raises ``ConnectionError`` at the end of the stream, ``TimeoutError``."""
    done = 0
    while done < len(view):
        count = sock.recv_into(view[done:])
        if not count:
            raise ConnectionError("closed the connection")
        done += count


def check_length(peer: str, found: int, expected: int) -> None:
    """Raises ``ProtocolError`` unless an answer is as long as it must be."""
    if found != expected:
        raise ProtocolError(f"{peer} announces {found} bytes of an expert: must be {expected}")


def lost(peer: str, err: OSError) -> PeerLostError:
    """The error for a connection that broke."""
    return PeerLostError(peer, str(err) or type(err).__name__)
