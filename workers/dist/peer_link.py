"""Connections of two workers beside the data plane: a question, an answer, no step waits for them.

A server accepts a few connections at a time, each in a thread of its own; both sides prove the
cluster token and agree on checkpoint and configuration before anything is asked. Nothing is
unpickled.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from cluster.errors import HandshakeError, PeerLostError, ProtocolError
from workers.dist.handshake import ConnectorHandshake, ListenerHandshake, PeerIdentity

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 8
"""Connections that a server serves at the same time."""
MAX_REASON_BYTES = 1024
"""Longest text with which a question is refused."""
_IDLE_S = 30.0
"""Longest time that a connection may be silent between two questions, or not take its answer."""
_READ_BYTES = 4096


def connect(
    peer: str, address: str, me: PeerIdentity, token: str, timeout_s: float
) -> socket.socket:
    """Connect to a peer's server and prove the token.

    Raises ``PeerLostError`` when the peer cannot be reached, ``HandshakeError`` when it is not one
    of ours.
    """
    host, _, port = address.rpartition(":")
    try:
        sock = socket.create_connection((host.strip("[]"), int(port)), timeout_s)
    except (OSError, ValueError) as err:
        raise PeerLostError(peer, f"cannot connect to {address}: {err}") from err
    try:
        shake_hands(sock, ConnectorHandshake(me, token), timeout_s)
    except OSError as err:
        sock.close()
        raise lost(peer, err) from err
    except ProtocolError:
        sock.close()
        raise
    sock.settimeout(timeout_s)
    return sock


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


def view_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy."""
    return tensor.view(torch.uint8).flatten().numpy().data


def lost(peer: str, err: OSError) -> PeerLostError:
    """The error for a connection that broke."""
    return PeerLostError(peer, str(err) or type(err).__name__)


class PeerServer(ABC):
    """One listener on a free port, which is open from the start; serves when it is told to."""

    def __init__(
        self, me: PeerIdentity, token: str, *, host: str, what: str, handshake_timeout_s: float
    ) -> None:
        """``what`` is given out; it names threads and log lines."""
        self._me = me
        self._token = token
        self._what = what
        self._timeout_s = handshake_timeout_s
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server((host, 0), backlog=MAX_CONNECTIONS)
        self._thread = threading.Thread(target=self._accept, name=f"{what}-server", daemon=True)
        self.num_sent_bytes = 0
        """Bytes of data that were sent."""
        self.num_refused = 0
        """Connections that were not let in."""

    @property
    def address(self) -> str:
        """``host:port`` of the listener."""
        host, port = self._listener.getsockname()[:2]
        return f"{host}:{port}"

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

    @abstractmethod
    def _answer(self, sock: socket.socket) -> None:
        """One question and its answer. Raises ``OSError`` when the connection is over."""

    def _start(self) -> None:
        """Begin to accept."""
        self._thread.start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, address = self._listener.accept()
            except OSError:
                self._closing.wait(0.05)  # closed, or out of descriptors: do not spin
                continue
            with self._lock:
                is_full = len(self._open) >= MAX_CONNECTIONS
                if not is_full:
                    self._open.add(sock)
            if is_full:
                self._refuse(f"{address[0]}:{address[1]}", "too many connections")
                sock.close()
                continue
            threading.Thread(
                target=self._serve, args=(sock, address), name=f"{self._what}-sender", daemon=True
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
            except ProtocolError as err:
                self._refuse(who, str(err))
            except OSError as err:
                logger.debug("%s for %s: %s", self._what, who, err)
            finally:
                with self._lock:
                    self._open.discard(sock)

    def _refuse(self, who: str, reason: str) -> None:
        self.num_refused += 1
        logger.warning("%s: %s refused to %s: %s", self._me.name, self._what, who, reason)
