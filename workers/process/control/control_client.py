"""A worker's end of the control socket, with its own thread.

The thread sends queued frames and heartbeats, answers status requests, and passes all other frames
to ``on_frame``. If the connection breaks, the client logs it and reconnects. It then first sends
the frames that a restarted controller needs: registration, readiness, report.

The thread also checks the lease, so that the worker stops serving when the lease expires. If the
thread fails, it calls ``on_failed``, which ends the worker.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from cluster.core.addresses import split_address, tune_socket
from cluster.core.control_codec import MAX_HELLO_BYTES, decode, decode_hello, encode, frame_length
from cluster.core.errors import HandshakeError, PeerLostError, ProtocolError, SupersededError
from cluster.core.frames import (
    Alive,
    ControlChallenge,
    ControlFrame,
    ControlHello,
    ControllerSnapshot,
    ControlProof,
    DrainRequest,
    Heartbeat,
    HeartbeatAck,
    NewGeneration,
    Register,
    StatusReply,
    StatusRequest,
    Superseded,
    WorkerFailed,
    WorkerReady,
)
from cluster.core.proof import TokenProof
from cluster.core.release import RELEASE, check_release
from workers.process.control.lease import Lease, TermGuard
from workers.transport.socket_io import WakePipe, receive_bytes

logger = logging.getLogger(__name__)

CONTROLLER = "controller"
"""Name of the controller in ``PeerLostError``."""
_PREFIX_BYTES = 4
_CHUNK_BYTES = 1 << 16
_RETRY_S = 0.1
_LEAST_S = 0.01  # shortest time for a connection
_REFUSED_S = 0.5
_RETRY_LIMIT_S = 1.0  # short, so that the lease is checked between two attempts
_FLUSH_S = 1.0
_ALIVE = encode(Alive())


class ControlClient:
    """Connection of one worker to the controller. ``send`` may be called from any thread.

    ``on_frame`` gets every frame except acknowledgements and status requests. The client's thread
    calls it, ``heartbeat`` and ``status``; all three must return quickly.
    """

    def __init__(
        self,
        address: str,
        token: str,
        worker_name: str,
        on_frame: Callable[[ControlFrame], None],
        *,
        heartbeat: Callable[[], Heartbeat],
        status: Callable[[], StatusReply],
        heartbeat_s: float = 0.5,
        alive_s: float = 0.1,
        connect_timeout_s: float = 10.0,
        lease: Lease | None = None,
        worker_report: Callable[[], Sequence[ControlFrame]] = tuple,
        on_failed: Callable[[str], None] = lambda reason: None,
        release: str = RELEASE,
    ) -> None:
        """``address`` is ``host:port``. The client's thread calls ``worker_report`` after each
        reconnect and sends the frames that it returns. If that thread fails, ``on_failed`` gets the
        reason. ``status`` returns a reply without ``token``; the client sets it.
        """
        self._address = address
        self._token = token
        self._name = worker_name
        self._release = release
        self._on_frame = on_frame
        self._heartbeat = heartbeat
        self._status = status
        self._heartbeat_s = heartbeat_s
        self._alive_s = min(alive_s, heartbeat_s)
        self._heartbeat_at = 0.0
        self._connect_timeout_s = connect_timeout_s
        self._worker_report = worker_report
        self._on_failed = on_failed
        self._lock = threading.Lock()
        self._queue: deque[bytes] = deque()
        self._repeated_frames: dict[type[ControlFrame], ControlFrame] = {}
        self._closing = False
        self._is_redirected = False
        self._guard = TermGuard()
        self._lease = lease or Lease()
        self._wakeup = WakePipe()
        self._thread = threading.Thread(target=self._run, name="control-client", daemon=True)
        self._first: socket.socket | None = None

    def start(self) -> None:
        """Connect to the controller, prove the cluster token, and start the thread.

        A controller that closes the connection (it may have many callers) is called again. Raises
        ``PeerLostError`` if it is not reached in time, ``HandshakeError`` for another token.
        """
        deadline = time.monotonic() + self._connect_timeout_s
        while self._first is None:
            try:
                self._first = self._connect(max(deadline - time.monotonic(), _LEAST_S))
            except (PeerLostError, ProtocolError) as err:
                was_closed = type(err.__cause__) in (ConnectionError, ConnectionResetError)
                if not was_closed or self._closing or time.monotonic() + _RETRY_S >= deadline:
                    self._wakeup.close()
                    raise
                self._wakeup.wait(_RETRY_S)
        self._lease.contact_at = time.monotonic()
        self._thread.start()

    @property
    def contact_at(self) -> float:
        """Monotonic time of the newest heartbeat that a controller has acknowledged."""
        return self._lease.contact_at

    def check_term(self, term: int, controller: str) -> None:
        """Record a controller (any thread). Raises ``SupersededError`` if it is not the newest."""
        self._guard.check(term, controller)

    def redirect(self, address: str) -> None:
        """Connect to a new controller at ``address`` (any thread)."""
        with self._lock:
            if address == self._address:
                return
            self._address = address
            self._is_redirected = True
        self._wakeup.ring()

    def send(self, frame: ControlFrame) -> None:
        """Queue a frame. A reconnect drops it, unless ``_repeated_frames`` keeps its type."""
        with self._lock:
            if isinstance(frame, (Register, WorkerReady, WorkerFailed, DrainRequest)):
                self._repeated_frames[type(frame)] = frame
            self._queue.append(encode(frame))
        self._wakeup.ring()

    def close(self) -> None:
        """Send queued frames, close the connection, end the thread."""
        self._closing = True
        self._wakeup.ring()
        if self._first is None:
            self._wakeup.close()
        elif self._thread is not threading.current_thread():
            self._thread.join(timeout=_FLUSH_S + self._heartbeat_s + 1.0)

    # ---- the client's thread --------------------------------------------------------------

    def _run(self) -> None:
        """Exchange frames until closed; reconnect whenever the connection breaks."""
        _raise_priority()
        try:
            self._serve()
        except Exception as err:
            logger.exception("the control thread of %s failed", self._name)
            self._closing = True
            self._on_failed(f"{type(err).__name__}: {err}")
        finally:
            self._wakeup.close()

    def _serve(self) -> None:
        connected = self._first
        while connected is not None:
            with connected:
                reason = self._exchange_or_report(connected)
            if self._closing:
                return
            logger.warning("lost the controller: %s", reason)
            connected = self._connect_again()

    def _exchange_or_report(self, sock: socket.socket) -> str:
        """Call ``_exchange_frames``; send an unexpected error to the controller and raise it."""
        try:
            if sock is not self._first:
                self._queue_registration()
            return self._exchange_frames(sock)
        except Exception as err:
            sock.settimeout(_FLUSH_S)
            with contextlib.suppress(OSError):
                sock.sendall(encode(WorkerFailed(reason=f"{type(err).__name__}: {err}")))
            raise

    def _exchange_frames(self, sock: socket.socket) -> str:
        """Exchange frames over one connection; returns the reason for its end."""
        sock.setblocking(False)
        incoming, outgoing = bytearray(), bytearray()
        next_beat = self._heartbeat_at = time.monotonic()
        flush_until = float("inf")
        with selectors.DefaultSelector() as selector:
            selector.register(self._wakeup, selectors.EVENT_READ)
            selector.register(sock, selectors.EVENT_READ)
            try:
                while True:
                    if self._is_redirected:
                        raise SupersededError("a new controller has taken over")
                    now = time.monotonic()
                    self._lease.check(now)
                    if now >= next_beat:
                        outgoing += self._next_sign_of_life(now)
                        next_beat = min(now + self._alive_s, self._heartbeat_at)
                    is_closing = self._closing  # read before the queue is emptied
                    while self._queue:
                        outgoing += self._queue.popleft()
                    if outgoing:
                        with contextlib.suppress(BlockingIOError):
                            del outgoing[: sock.send(outgoing)]
                    if is_closing:
                        flush_until = min(flush_until, now + _FLUSH_S)
                        if not outgoing or now >= flush_until:
                            _close_after_peer(sock)
                            return "closed"
                    writes = selectors.EVENT_WRITE if outgoing else 0
                    selector.modify(sock, selectors.EVENT_READ | writes)
                    for key, events in selector.select(max(0.0, next_beat - now)):
                        if key.fileobj is self._wakeup:
                            self._wakeup.drain()
                        elif events & selectors.EVENT_READ:
                            self._receive(sock, incoming)
            except SupersededError as err:
                outgoing += encode(Superseded(term=self._guard.term))
                sock.settimeout(_FLUSH_S)
                with contextlib.suppress(OSError):
                    sock.sendall(outgoing)
                    _close_after_peer(sock)
                return str(err)
            except (OSError, ProtocolError) as err:
                return str(err) or type(err).__name__

    def _next_sign_of_life(self, now: float) -> bytes:
        """The next heartbeat if it is due, else a minimal frame that shows the worker is alive."""
        if now < self._heartbeat_at:
            return _ALIVE
        self._heartbeat_at = now + self._heartbeat_s
        return encode(replace(self._heartbeat(), number=self._lease.record_heartbeat(now)))

    def _receive(self, sock: socket.socket, incoming: bytearray) -> None:
        """Read available bytes and handle complete frames. Raises ``ConnectionError`` at EOF."""
        with contextlib.suppress(BlockingIOError):
            data = sock.recv(_CHUNK_BYTES)
            if not data:
                raise ConnectionError("closed by the controller")
            incoming += data
        while len(incoming) >= _PREFIX_BYTES:
            end = _PREFIX_BYTES + frame_length(bytes(incoming[:_PREFIX_BYTES]))
            if len(incoming) < end:
                return
            frame = decode(bytes(incoming[_PREFIX_BYTES:end]))
            del incoming[:end]
            self._handle(frame)

    def _handle(self, frame: ControlFrame) -> None:
        if isinstance(frame, (HeartbeatAck, ControllerSnapshot, NewGeneration)):
            self._guard.check(frame.term, frame.controller)
        if isinstance(frame, HeartbeatAck):
            self._lease.acknowledge(frame.number)
        elif isinstance(frame, StatusRequest):
            left_out = {} if frame.has_load else {"expert_load": None}
            self.send(replace(self._status(), token=frame.token, **left_out))
        else:
            self._on_frame(frame)

    # ---- connection -----------------------------------------------------------------------

    def _connect_again(self) -> socket.socket | None:
        """Reconnect as soon as a controller is reachable; None if closed while waiting."""
        while not self._closing:
            self._lease.check(time.monotonic())
            try:
                sock = self._connect(min(self._connect_timeout_s, _RETRY_LIMIT_S))
            except PeerLostError as err:
                logger.debug("no controller yet: %s", err)
            except ProtocolError as err:  # another program may use the port
                logger.warning("the controller's handshake failed: %s", err)
                self._wakeup.wait(_REFUSED_S)
            else:
                return sock
            self._wakeup.wait(_RETRY_S)
        return None

    def _queue_registration(self) -> None:
        """Replace the queue with the frames that a restarted controller needs first."""
        with self._lock:  # frames for the old connection are obsolete
            self._queue.clear()
            greeting = [*self._repeated_frames.values(), *self._worker_report()]
            self._queue.extend(encode(f) for f in greeting)

    def _connect(self, timeout_s: float) -> socket.socket:
        """Connect and prove the cluster token. Raises ``PeerLostError`` and ``HandshakeError``."""
        with self._lock:
            address, self._is_redirected = self._address, False
        deadline = time.monotonic() + timeout_s
        try:
            sock = socket.create_connection(split_address(address), timeout=timeout_s)
        except OSError as err:
            raise PeerLostError(CONTROLLER, f"cannot connect to {address}: {err}") from err
        try:
            tune_socket(sock)
            self._handshake(sock, address, deadline)
        except OSError as err:
            sock.close()
            raise PeerLostError(CONTROLLER, f"handshake with {address}: {err}") from err
        except ProtocolError:
            sock.close()
            raise
        return sock

    def _handshake(self, sock: socket.socket, address: str, deadline: float) -> None:
        """Run the worker's side of the handshake: both sides prove the token and send a release."""
        proof = TokenProof(self._token, "control", is_caller=True)
        hello = ControlHello(worker=self._name, nonce=proof.nonce, release=self._release)
        sock.sendall(encode(hello))
        length = frame_length(bytes(receive_bytes(sock, _PREFIX_BYTES, deadline)), MAX_HELLO_BYTES)
        challenge = decode_hello(bytes(receive_bytes(sock, length, deadline)))
        if not isinstance(challenge, ControlChallenge):
            raise HandshakeError(f"{address} is not a controller")
        proof.their_nonce = challenge.nonce
        if not proof.is_peer_proof(challenge.proof):
            raise HandshakeError(f"{address} does not know the cluster token")
        sock.sendall(encode(ControlProof(proof=proof.make_proof())))
        check_release(challenge.release, "the controller", self._release, self._name)


def _raise_priority() -> None:
    """Give the calling thread real-time priority, if permitted.

    This needs CAP_SYS_NICE or RLIMIT_RTPRIO. Threads and processes that this thread starts do not
    inherit it.
    """
    if hasattr(os, "sched_setscheduler"):  # Linux
        policy = os.SCHED_RR | os.SCHED_RESET_ON_FORK
        with contextlib.suppress(OSError):
            os.sched_setscheduler(threading.get_native_id(), policy, os.sched_param(1))


def _close_after_peer(sock: socket.socket) -> None:
    """Wait until the peer has closed. Closing with unread input would reset the connection."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(_FLUSH_S)
        while sock.recv(_CHUNK_BYTES):
            pass
