"""Takes experts out of another worker's memory, over a connection of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from cluster.errors import ProtocolError
from workers.dist.handshake import PeerIdentity
from workers.dist.peer_link import MAX_REASON_BYTES, connect, lost, receive_exactly, view_bytes
from workers.experts.rate_limit import RateLimit
from workers.experts.weight_frames import (
    ANSWER,
    CHUNK_BYTES,
    HELD,
    QUESTION,
    check_length,
    checksum,
    expert_num_bytes,
    expert_shapes,
)
from workers.families.base import BankSpec


class WeightClient:
    """A connection to one worker's ``WeightServer``. One thread uses it; blocks with time-outs."""

    def __init__(
        self,
        peer: str,
        address: str,
        me: PeerIdentity,
        token: str,
        *,
        rate: RateLimit,
        timeout_s: float = 10.0,
    ) -> None:
        """Connect and prove the token. ``rate`` may end everything between two chunks.

        Raises ``PeerLostError`` when the peer cannot be reached, ``HandshakeError`` when it is not
        one of ours.
        """
        self._peer = peer
        self._rate = rate
        self._sock = connect(peer, address, me, token, timeout_s)

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()

    def fetch(self, bank: BankSpec, expert: int, dtype: torch.dtype) -> list[Tensor]:
        """The matrices of an expert in the order of ``expert_shapes``, checked.

        Raises ``PeerLostError`` when the connection breaks or is too slow, ``MoveGivenUpError``,
        and ``ProtocolError`` when the peer does not hold the expert or what came is damaged.
        """
        try:
            self._sock.sendall(QUESTION.pack(bank.index, expert))
            return self._receive(bank, expert, dtype)
        except OSError as err:
            raise lost(self._peer, err) from err

    def _receive(self, bank: BankSpec, expert: int, dtype: torch.dtype) -> list[Tensor]:
        head = bytearray(ANSWER.size)
        receive_exactly(self._sock, memoryview(head))
        status, length, expected = ANSWER.unpack(head)
        if status != HELD:
            reason = bytearray(min(length, MAX_REASON_BYTES))
            receive_exactly(self._sock, memoryview(reason))
            raise ProtocolError(reason.decode(errors="replace"))
        check_length(self._peer, length, expert_num_bytes(bank, dtype))
        matrices = [torch.empty(shape, dtype=dtype) for _, _, shape in expert_shapes(bank)]
        parts = [view_bytes(m) for m in matrices]
        for part in parts:
            for first in range(0, len(part), CHUNK_BYTES):
                chunk = part[first : first + CHUNK_BYTES]
                self._rate.take(len(chunk))
                receive_exactly(self._sock, chunk)
        if checksum(bank.index, expert, parts) != expected:
            raise ProtocolError(
                f"expert {expert} of bank {bank.bank} layer {bank.layer} from {self._peer} is "
                "damaged: its checksum differs"
            )
        return matrices
