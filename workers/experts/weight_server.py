"""Gives the experts of this worker's slots to other workers, beside the serving of steps.

Connections of its own, never the dispatch edges; a thread for each, a few at a time. Who asks
keeps to the rate. What a slot holds is copied out under the slots' own record of contents, so that
a slot that is overwritten meanwhile is never sent as what it was.
"""

from __future__ import annotations

import socket

from torch import Tensor

from workers.dist.handshake import PeerIdentity
from workers.dist.peer_link import MAX_REASON_BYTES, PeerServer, receive_exactly, view_bytes
from workers.experts.slots import ExpertSlots
from workers.experts.weight_frames import ANSWER, CHUNK_BYTES, HELD, QUESTION, REFUSED, checksum


class WeightServer(PeerServer):
    """One listener; ``address`` is the worker's ``Member.weights_address``."""

    def __init__(
        self,
        me: PeerIdentity,
        token: str,
        *,
        host: str,
        handshake_timeout_s: float = 10.0,
    ) -> None:
        """Opens the listener on a free port."""
        super().__init__(
            me, token, host=host, what="weights", handshake_timeout_s=handshake_timeout_s
        )
        self._slots: ExpertSlots | None = None

    def start(self, slots: ExpertSlots) -> None:
        """Begin to give out what is in these slots."""
        self._slots = slots
        self._start()

    def _answer(self, sock: socket.socket) -> None:
        """One question and its answer. Raises ``OSError`` when the connection is over."""
        question = bytearray(QUESTION.size)
        receive_exactly(sock, memoryview(question))
        bank, expert = QUESTION.unpack(question)
        assert self._slots is not None
        matrices = self._slots.read_expert(bank, expert)
        if matrices is None:
            reason = f"{self._me.name} holds no expert {expert} of bank {bank}".encode()
            sock.sendall(ANSWER.pack(REFUSED, len(reason[:MAX_REASON_BYTES]), b"") + reason)
            return
        self._send(sock, bank, expert, matrices)

    def _send(self, sock: socket.socket, bank: int, expert: int, matrices: list[Tensor]) -> None:
        parts = [view_bytes(m) for m in matrices]
        length = sum(len(p) for p in parts)
        sock.sendall(ANSWER.pack(HELD, length, checksum(bank, expert, parts)))
        for part in parts:
            for first in range(0, len(part), CHUNK_BYTES):
                chunk = part[first : first + CHUNK_BYTES]
                sock.sendall(chunk)
                self.num_sent_bytes += len(chunk)
