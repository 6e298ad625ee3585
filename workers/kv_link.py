"""KV blocks between two attention workers: who computes a prompt asks who has computed its prefix.

    asking                                      lending
    handshake (cluster token, checkpoint, configuration), then for every prefix:
    u16 count, 32-byte hashes of blocks   ->
                                          <-    u16 count of those from the first on that are here,
                                                u32 bytes of a block, for each of them 16 bytes
                                                checksum and the data
    u16 count of the blocks that were kept ->

A block's data are its keys and values [2 * num_kv_heads, block_size, D], layer by layer, in the
model's dtype. The checksum covers hash and data, so that neither a flipped bit nor the wrong block
goes unnoticed. Who does not know the hash gets no block: it covers tokens and tenant. Nothing is
unpickled, and both sides know the length that a block must have.
"""

from __future__ import annotations

import hashlib
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from cluster.errors import PeerLostError, ProtocolError
from workers.dist.handshake import PeerIdentity
from workers.dist.peer_link import PeerServer, connect, lost, receive_exactly, view_bytes
from workers.prefix_hash import HASH_BYTES, BlockHash

COUNT: Final = struct.Struct("!H")
"""Blocks asked for, and blocks kept."""
ANSWER: Final = struct.Struct("!HI")
"""Blocks that follow, bytes of each."""
MAX_BLOCKS: Final = 2**16 - 1
"""Most blocks of one question."""
CHECKSUM_BYTES: Final = 16


class Lender(Protocol):
    """Who keeps the blocks; ``KvLending`` for real ones. Any thread may call it."""

    def borrow(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Blocks of the longest run from the first on, which stay as they are until returned."""

    def read(self, block: int) -> Tensor:
        """The data of a borrowed block, contiguous in CPU memory."""

    def give_back(self, blocks: list[int], num_kept: int) -> None:
        """They need not stay any more; the other worker has the first ``num_kept`` of them."""


def checksum(block_hash: BlockHash, data: memoryview) -> bytes:
    """16 bytes over a block's name and data."""
    digest = hashlib.blake2b(block_hash, digest_size=CHECKSUM_BYTES, person=b"kv data")
    digest.update(data)
    return digest.digest()


class KvServer(PeerServer):
    """One listener; ``address`` is the worker's ``Member.kv_address``."""

    def __init__(
        self, me: PeerIdentity, token: str, *, host: str, handshake_timeout_s: float = 10.0
    ) -> None:
        """Opens the listener on a free port."""
        super().__init__(
            me, token, host=host, what="kv-blocks", handshake_timeout_s=handshake_timeout_s
        )
        self._lender: Lender | None = None

    def start(self, lender: Lender) -> None:
        """Begin to give out what it lends."""
        self._lender = lender
        self._start()

    def _answer(self, sock: socket.socket) -> None:
        head = bytearray(COUNT.size)
        receive_exactly(sock, memoryview(head))
        joined = bytearray(COUNT.unpack(head)[0] * HASH_BYTES)
        receive_exactly(sock, memoryview(joined))
        hashes = [bytes(joined[i : i + HASH_BYTES]) for i in range(0, len(joined), HASH_BYTES)]
        assert self._lender is not None, "it lends before it serves"
        blocks, num_kept = self._lender.borrow(hashes), 0
        try:
            self._send(sock, self._lender, hashes, blocks)
            receive_exactly(sock, memoryview(head))
            num_kept = min(COUNT.unpack(head)[0], len(blocks))
        finally:
            self._lender.give_back(blocks, num_kept)

    def _send(
        self,
        sock: socket.socket,
        lender: Lender,
        hashes: Sequence[BlockHash],
        blocks: Sequence[int],
    ) -> None:
        if not blocks:
            sock.sendall(ANSWER.pack(0, 0))
        for place, (block, block_hash) in enumerate(zip(blocks, hashes, strict=False)):
            data = view_bytes(lender.read(block))
            if not place:
                sock.sendall(ANSWER.pack(len(blocks), len(data)))
            sock.sendall(checksum(block_hash, data))
            sock.sendall(data)
            self.num_sent_bytes += len(data)


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """How to ask one peer."""

    peer: str
    """Its name."""
    address: str
    """Its ``Member.kv_address``."""
    me: PeerIdentity
    """Who asks."""
    token: str
    """Cluster token."""
    deadline_s: float
    """``time.monotonic`` after which nothing is waited for."""


def fetch_blocks(
    asking: Asking,
    hashes: Sequence[BlockHash],
    buffer: Tensor,
    keep: Callable[[int, Tensor], None],
) -> int:
    """Ask for a run of blocks and hand each to ``keep``, checked; returns how many came.

    ``buffer`` has the shape and dtype of a block's data in CPU memory; ``keep`` gets the block's
    place in ``hashes``, and the buffer, which the next block overwrites.

    Raises ``PeerLostError`` when the connection breaks or is too slow, and ``ProtocolError`` when
    what came is damaged or not what was asked for; the blocks before that were kept.
    """
    num_kept, view = 0, view_bytes(buffer)
    left = _left(asking)
    with closing(connect(asking.peer, asking.address, asking.me, asking.token, left)) as sock:
        try:
            sock.sendall(COUNT.pack(len(hashes)) + b"".join(hashes))
            head = bytearray(ANSWER.size)
            _receive(sock, memoryview(head), asking)
            count, length = ANSWER.unpack(head)
            if count > len(hashes) or (count and length != len(view)):
                raise ProtocolError(
                    f"{asking.peer} announces {count} KV blocks of {length} bytes: at most "
                    f"{len(hashes)} of {len(view)} were asked for"
                )
            for place, block_hash in enumerate(hashes[:count]):
                expected = bytearray(CHECKSUM_BYTES)
                _receive(sock, memoryview(expected), asking)
                _receive(sock, view, asking)
                if checksum(block_hash, view) != expected:
                    raise ProtocolError(f"a KV block from {asking.peer} is damaged")
                keep(place, buffer)
                num_kept += 1
            sock.sendall(COUNT.pack(num_kept))
        except OSError as err:
            raise lost(asking.peer, err) from err
    return num_kept


def block_buffer(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """CPU memory for one block's data."""
    return torch.empty(tuple(shape), dtype=dtype)


def _receive(sock: socket.socket, view: memoryview, asking: Asking) -> None:
    """Fill ``view`` before the deadline, however slowly the bytes come."""
    done = 0
    while done < len(view):
        sock.settimeout(_left(asking))
        count = sock.recv_into(view[done:])
        if not count:
            raise ConnectionError("closed the connection")
        done += count


def _left(asking: Asking) -> float:
    left = asking.deadline_s - time.monotonic()
    if left <= 0:
        raise PeerLostError(asking.peer, "its KV blocks did not come in time")
    return left
