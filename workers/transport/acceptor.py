"""Opens and accepts connections between workers, and runs the handshake that makes them edges."""

from __future__ import annotations

import errno
import logging
import os
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from msgspec.structs import replace

from cluster.core.addresses import split_address
from cluster.core.errors import GenerationChangedError, HandshakeError, PeerLostError
from cluster.core.topology import Member
from workers.transport.handshake import ConnectorHandshake, ListenerHandshake, PeerIdentity

logger = logging.getLogger(__name__)

MAX_PENDING = 256
"""Maximum number of accepted connections without proof of the cluster token; one more closes the
oldest."""
_CONNECT_ATTEMPTS = 3
_RETRY_S = 0.1
_READ_BYTES = 4096


@dataclass(slots=True, eq=False)
class Pending:
    """A connection that is connecting or in the handshake, before it is an edge. No method blocks.

    The owner watches ``sock`` for ``events``, calls ``step`` when the socket is ready, and drops
    the connection at ``deadline``.
    """

    sock: socket.socket
    handshake: ListenerHandshake | ConnectorHandshake
    name: str
    """Name of the peer for logs; its address until the name is known."""
    member: Member | None
    """Member of the generation to which this worker connects; None for an accepted connection."""
    deadline: float
    """Monotonic time at which the connection is dropped if it has not become an edge."""
    out: bytes
    """Bytes that remain to be sent."""
    is_connecting: bool

    @property
    def events(self) -> int:
        return selectors.EVENT_WRITE if self.out else selectors.EVENT_READ

    def step(self) -> bool:
        """Continue the handshake without waiting; return whether it is complete and all is sent.

        Raises ``OSError`` if the connect fails, and ``HandshakeError`` if the handshake fails.
        """
        if self.is_connecting:
            code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
            self.is_connecting = False
        try:
            self._exchange()
        except OSError as err:
            raise HandshakeError(f"the connection broke in the handshake: {err}") from err
        return self.handshake.done and not self.out

    def _exchange(self) -> None:
        self._send()
        while not self.handshake.done:
            try:
                data = self.sock.recv(_READ_BYTES)
            except BlockingIOError:
                return
            if not data:
                raise HandshakeError("closed the connection during the handshake")
            self.out += self.handshake.feed(data)
            self._send()

    def _send(self) -> None:
        try:
            while self.out:
                self.out = self.out[self.sock.send(self.out) :]
        except BlockingIOError:
            return


class Acceptor:
    """Opens and accepts connections between workers, on the owner's selector. Data thread only.

    A connection with invalid data, a timeout or a wrong token is closed; others continue. At most
    ``MAX_PENDING`` accepted connections may be without proof of the cluster token; one more closes
    the oldest.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        me: PeerIdentity,
        token: str,
        *,
        host: str,
        port: int,
        timeout_s: float,
        answer_limit_s: float,
        refusal: Callable[[PeerIdentity], str | None],
        opened: Callable[[socket.socket, PeerIdentity, int], None],
    ) -> None:
        """Open the listener on ``host`` and ``port`` (0: a free port).

        ``refusal`` returns the reason to refuse a peer that has proved the token, or None to accept
        it. ``opened`` is called with the socket, the peer's identity and the generation of a new
        edge. ``answer_limit_s`` limits the time until the peer's host accepts a connect, and
        ``timeout_s`` the time of the handshake.
        """
        self.generation = 0
        """Generation that this worker has applied last; 0 before the first."""
        self._selector = selector
        self._me = me
        self._token = token
        self._timeout_s = timeout_s
        self._answer_limit_s = answer_limit_s
        self._refusal = refusal
        self._opened = opened
        self._pending: dict[socket.socket, Pending] = {}
        self._attempts: dict[str, tuple[int, float]] = {}
        self._listener = socket.create_server((host, port), backlog=512)
        self._listener.setblocking(False)
        self.address = "{}:{}".format(*self._listener.getsockname()[:2])
        selector.register(self._listener, selectors.EVENT_READ, self.accept)

    @property
    def next_deadline(self) -> float | None:
        """Monotonic time at which ``expire`` must be called; None if no connection is pending."""
        if not self._pending:
            return None
        return min(p.deadline for p in self._pending.values())

    def begin_generation(self, number: int) -> None:
        """Drop unfinished connections to peers, and reset the counts of attempts to connect."""
        self.generation = number
        self._attempts.clear()
        for pending in list(self._pending.values()):
            if isinstance(pending.handshake, ConnectorHandshake):
                self._drop(pending)

    def connect(self, member: Member) -> None:
        """Begin to open the edge to ``member``, unless an attempt is running or has just ended.

        Raises ``PeerLostError`` if the address is invalid or refuses the connect, or after too many
        attempts: a peer closes the handshake without a message if the cluster token is wrong.
        """
        if any(p.member == member for p in self._pending.values()):
            return
        count, not_before = self._attempts.get(member.name, (0, 0.0))
        now = time.monotonic()
        if count >= _CONNECT_ATTEMPTS:
            reason = "it closes the handshake: does it have the same cluster token?"
            raise PeerLostError(member.name, reason)
        if now < not_before:
            return
        self._attempts[member.name] = (count + 1, now + _RETRY_S)
        try:
            sock = _start_connect(member.data_address)
        except (OSError, ValueError) as err:
            raise PeerLostError(member.name, f"{member.data_address}: {err}") from err
        self._add(sock, ConnectorHandshake(self._identity(), self._token), member.name, member)

    def accept(self) -> None:
        try:
            sock, address = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as err:
            logger.warning("%s: cannot accept: %s", self._me.name, err)
            time.sleep(0.01)  # no file descriptors: the listener stays ready, so pause
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        waiting = [p for p in self._pending.values() if p.handshake.peer is None and not p.member]
        if len(waiting) >= MAX_PENDING:
            self.refuse(waiting[0].name, "too many connections without a token")
            self._drop(waiting[0])
        handshake = ListenerHandshake(self._identity(), self._token, self._refusal)
        self._add(sock, handshake, f"{address[0]}:{address[1]}", None)

    def refuse(self, name: str, reason: str) -> None:
        """Log a warning that the connection with ``name`` is refused."""
        logger.warning("%s: connection with %s refused: %s", self._me.name, name, reason)

    def expire(self) -> None:
        """Drop unfinished connections that are past their deadline.

        Raises ``PeerLostError`` if the host of a member to connect to does not respond.
        """
        now = time.monotonic()
        for pending in [p for p in self._pending.values() if p.deadline <= now]:
            if pending.is_connecting:
                self._drop(pending)
                limit = f"no answer within {self._answer_limit_s:g} s"
                raise PeerLostError(pending.name, f"cannot connect: {limit}")
            self.refuse(pending.name, "the handshake was not finished in time")
            self._drop(pending)

    def advance(self, pending: Pending) -> None:
        """Continue the handshake of a connection after its socket became ready.

        Raises ``PeerLostError`` if the connect fails or the peer refuses this worker, and
        ``GenerationChangedError`` if the peer refuses this worker from a later generation.
        """
        if pending.sock not in self._pending:
            return
        if pending.is_connecting:
            pending.deadline = time.monotonic() + self._timeout_s
        try:
            is_finished = pending.step()
        except HandshakeError as err:
            self.refuse(pending.name, str(err))
            self._drop(pending)
            handshake = pending.handshake
            if not isinstance(handshake, ConnectorHandshake) or not handshake.has_verdict:
                return
            if handshake.is_outdated:
                raise GenerationChangedError(f"{pending.name}: {err}") from err
            raise PeerLostError(pending.name, str(err)) from err
        except OSError as err:
            self._drop(pending)
            raise PeerLostError(pending.name, f"cannot connect: {err.strerror}") from err
        if is_finished:
            self._finish(pending)
        else:
            self._selector.modify(pending.sock, pending.events, pending)

    def close(self) -> None:
        """Close the listener and all connections that are not edges yet."""
        for pending in list(self._pending.values()):
            self._drop(pending)
        self._selector.unregister(self._listener)
        self._listener.close()

    def _identity(self) -> PeerIdentity:
        return replace(self._me, generation=self.generation)

    def _add(
        self,
        sock: socket.socket,
        handshake: ListenerHandshake | ConnectorHandshake,
        name: str,
        member: Member | None,
    ) -> None:
        out = handshake.start() if isinstance(handshake, ConnectorHandshake) else b""
        limit_s = self._timeout_s if member is None else self._answer_limit_s
        deadline = time.monotonic() + limit_s
        pending = Pending(sock, handshake, name, member, deadline, out, member is not None)
        self._pending[sock] = pending
        self._selector.register(sock, pending.events, pending)

    def _drop(self, pending: Pending) -> None:
        self._release(pending)
        pending.sock.close()

    def _release(self, pending: Pending) -> None:
        self._selector.unregister(pending.sock)
        del self._pending[pending.sock]

    def _finish(self, pending: Pending) -> None:
        peer, member, handshake = pending.handshake.peer, pending.member, pending.handshake
        assert peer is not None
        if isinstance(handshake, ListenerHandshake) and handshake.refusal is not None:
            self.refuse(peer.name, handshake.refusal)
            self._drop(pending)
        elif member and (peer.name, peer.role, peer.rank) != (
            member.name,
            member.role,
            member.rank,
        ):
            self._drop(pending)
            raise PeerLostError(member.name, f"{peer.name} answered at its address")
        else:
            self._release(pending)
            self._opened(pending.sock, peer, self.generation if member else peer.generation)


def _start_connect(address: str) -> socket.socket:
    """Begin a nonblocking connect to ``host:port``. Raises ``OSError``."""
    info = socket.getaddrinfo(*split_address(address), type=socket.SOCK_STREAM)[0]
    sock = socket.socket(info[0], info[1])
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    code = sock.connect_ex(info[4])
    if code not in (0, errno.EINPROGRESS):
        sock.close()
        raise OSError(code, os.strerror(code))
    return sock
