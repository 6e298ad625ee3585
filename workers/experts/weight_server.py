"""Gives the experts of this worker's slots to other workers, beside the serving of steps.

Connections of its own, never the dispatch edges; a thread for each, a few at a time. Who asks
keeps to the rate. What a slot holds is copied out under the slots' own record of contents, so that
a slot that is overwritten meanwhile is never sent as what it was.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading

from torch import Tensor

from cluster.errors import HandshakeError
from workers.dist.handshake import ListenerHandshake, PeerIdentity
from workers.experts.slots import ExpertSlots
from workers.experts.weight_frames import (
    ANSWER,
    CHUNK_BYTES,
    HELD,
    MAX_REASON_BYTES,
    QUESTION,
    REFUSED,
    checksum,
    receive_exactly,
    shake_hands,
    view_bytes,
)

logger = logging.getLogger(__name__)

_MAX_CONNECTIONS = 8
_IDLE_S = 30.0
"""Longest time that a connection may be silent between two questions, or not take its answer."""


class WeightServer:
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
        self._me = me
        self._token = token
        self._slots: ExpertSlots | None = None
        self._timeout_s = handshake_timeout_s
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server((host, 0), backlog=_MAX_CONNECTIONS)
        self._thread = threading.Thread(target=self._accept, name="weight-server", daemon=True)
        self.num_sent_bytes = 0
        """Bytes of experts that were sent."""
        self.num_refused = 0
        """Connections that were not let in."""

    @property
    def address(self) -> str:
        """``host:port`` of the listener."""
        host, port = self._listener.getsockname()[:2]
        return f"{host}:{port}"

    def start(self, slots: ExpertSlots) -> None:
        """Begin to give out what is in these slots."""
        self._slots = slots
        self._thread.start()

    def close(self) -> None:
        """Close the listener and every connection."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        if self._thread.is_alive():
            self._thread.join(self._timeout_s)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, address = self._listener.accept()
            except OSError:
                self._closing.wait(0.05)  # closed, or out of descriptors: do not spin
                continue
            with self._lock:
                is_full = len(self._open) >= _MAX_CONNECTIONS
                if not is_full:
                    self._open.add(sock)
            if is_full:
                self._refuse(f"{address[0]}:{address[1]}", "too many connections")
                sock.close()
                continue
            threading.Thread(
                target=self._serve, args=(sock, address), name="weight-sender", daemon=True
            ).start()

    def _serve(self, sock: socket.socket, address: tuple[str, int]) -> None:
        who = f"{address[0]}:{address[1]}"
        with sock:
            try:
                handshake = ListenerHandshake(self._me, self._token, lambda peer: None)
                shake_hands(sock, handshake, self._timeout_s)
                if handshake.refusal is not None:
                    raise HandshakeError(handshake.refusal)
                sock.settimeout(_IDLE_S)
                while not self._closing.is_set():
                    self._answer(sock)
            except HandshakeError as err:
                self._refuse(who, str(err))
            except OSError as err:
                logger.debug("weights for %s: %s", who, err)
            finally:
                with self._lock:
                    self._open.discard(sock)

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

    def _refuse(self, who: str, reason: str) -> None:
        self.num_refused += 1
        logger.warning("%s: weights refused to %s: %s", self._me.name, who, reason)
