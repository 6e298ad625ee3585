"""One connection before it is an edge."""

from __future__ import annotations

import errno
import os
import selectors
import socket

from cluster.core.addresses import split_address
from cluster.core.errors import HandshakeError
from cluster.core.topology import Member
from workers.transport.handshake import ConnectorHandshake, ListenerHandshake

_READ_BYTES = 4096


class Pending:
    """A connection that is connecting, or in the handshake. Nothing here blocks.

    The owner watches ``sock`` for ``events``, calls ``step`` when it is ready, and drops the
    connection at ``deadline``.
    """

    def __init__(
        self,
        sock: socket.socket,
        handshake: ListenerHandshake | ConnectorHandshake,
        *,
        deadline: float,
        who: str,
        member: Member | None,
    ) -> None:
        self.sock = sock
        self.handshake = handshake
        self.deadline = deadline
        """Monotonic time by which it must be an edge."""
        self.who = who
        """The peer's name, or its address until the name is known."""
        self.member = member
        """The member to connect to; None for an accepted connection."""
        self._connecting = member is not None
        self._out = handshake.start() if isinstance(handshake, ConnectorHandshake) else b""

    @property
    def events(self) -> int:
        return selectors.EVENT_WRITE if self._out else selectors.EVENT_READ

    @property
    def finished(self) -> bool:
        """The handshake is over and everything is sent."""
        return self.handshake.done and not self._out

    @property
    def has_verdict(self) -> bool:
        """Connector: the peer proved the token and the two do not match; a retry is useless."""
        return isinstance(self.handshake, ConnectorHandshake) and self.handshake.has_verdict

    def step(self) -> None:
        """Continue as far as the socket allows.

        Raises ``OSError`` when the address does not answer, ``HandshakeError`` otherwise.
        """
        if self._connecting:
            code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
            self._connecting = False
        try:
            self._exchange()
        except OSError as err:
            raise HandshakeError(f"the connection broke in the handshake: {err}") from err

    def _exchange(self) -> None:
        self._send()
        while not self.handshake.done:
            try:
                data = self.sock.recv(_READ_BYTES)
            except BlockingIOError:
                return
            if not data:
                raise HandshakeError("closed the connection during the handshake")
            self._out += self.handshake.feed(data)
            self._send()

    def _send(self) -> None:
        try:
            while self._out:
                self._out = self._out[self.sock.send(self._out) :]
        except BlockingIOError:
            return


def start_connect(address: str) -> socket.socket:
    """Begin to connect to ``host:port`` without waiting. Raises ``OSError``."""
    info = socket.getaddrinfo(*split_address(address), type=socket.SOCK_STREAM)[0]
    sock = socket.socket(info[0], info[1])
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    code = sock.connect_ex(info[4])
    if code not in (0, errno.EINPROGRESS):
        sock.close()
        raise OSError(code, os.strerror(code))
    return sock
