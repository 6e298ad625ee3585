"""A stand-in for ``socket.socket``: streams over the virtual network."""

from __future__ import annotations

import errno
import math
import selectors
import socket as real
import struct
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tests.simulation.kernel import Fiber
from tests.simulation.network import Pipe, network

if TYPE_CHECKING:
    from tests.simulation.polling import SimSelector

_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
_RETRANSMIT_S = 0.2
_INFO_BYTES = 128
_PART_CHANCE = 0.01
"""Chance that the kernel takes only a part of what is sent."""


class SimSocket:
    """A TCP socket: a listener, or one end of a stream."""

    def __init__(self, family: int = real.AF_INET, kind: int = real.SOCK_STREAM) -> None:
        self._net = network()
        self._kernel = self._net.kernel
        process = self._kernel.process
        assert process is not None, "sockets belong to processes"
        self.process, self.host = process, process.host
        self.peer: SimSocket | None = None
        self.address = ""
        self.accepted: deque[SimSocket] | None = None
        """Of a listener: connections that wait."""
        self.watchers: dict[SimSelector, None] = {}
        self.on_change: Any = None
        """Called when there is something to read, on the process's event loop."""
        self._fd = self._net.new_fd()
        self._net.by_fd[self._fd] = self
        self._timeout_s: float | None = None
        self._received = bytearray()
        self._out: Pipe | None = None
        self._num_out = 0
        """Bytes that the other end has not read."""
        self._buffer_bytes = self._net.buffer_bytes(self.host)
        self._unsent_limit_s = 0.0
        self._sent = self._delivered = self._acknowledged = 0
        self._unacknowledged_at: float | None = None
        self._at_end = self._is_closed = self._sent_end = self._is_connecting = False
        self._is_timed = self._is_forgotten = False
        self._error = 0
        self._waiting: list[Fiber] = []
        process.sockets[self] = None

    # ---- what the network does --------------------------------------------------------------

    def join(self, peer: SimSocket) -> None:
        """This end sends to ``peer`` from now on."""
        self.peer = peer
        self._out = Pipe(self._net, self.host, peer.host)
        self._net.connections[self] = None

    def break_off(self, code: int = errno.ECONNRESET) -> None:
        """The connection is reset."""
        if not self._is_closed:
            self._error = self._error or code
            self._changed()

    def forget(self) -> None:
        """This end treats the connection as reset; the other end learns it when it sends."""
        if not self._is_closed and not self._is_forgotten:
            self._is_forgotten = True
            self._received.clear()
            self.break_off()

    def resize(self, buffer_bytes: int) -> None:
        """Another limit of the bytes on their way."""
        self._buffer_bytes = buffer_bytes
        self._changed()

    def _take(self, data: bytes) -> None:
        assert self.peer is not None
        peer, out = self.peer, self._out
        if self._is_closed or self._is_forgotten:
            if out is not None and not peer._is_closed:
                out.send(peer.break_off)
            return
        self._received += data
        peer._delivered += len(data)
        if out is not None and not out.link.num_blocks:
            peer._acknowledge()
        for watcher in self.watchers:
            watcher.touch(self)
        if self._waiting or self.on_change is not None:
            self._tell()

    def _acknowledge(self) -> None:
        """What was delivered is acknowledged."""
        is_new, self._acknowledged = self._delivered > self._acknowledged, self._delivered
        if self._acknowledged == self._sent:
            self._unacknowledged_at = None
        elif is_new:
            self._unacknowledged_at = self._kernel.now

    def _tcp_info(self) -> bytes:
        """``struct tcp_info``: retransmissions, segments under way, acknowledged bytes."""
        peer = self.peer
        if peer is not None and peer._out is not None and not peer._out.link.num_blocks:
            self._acknowledge()
        since = self._unacknowledged_at
        silence_s = 0.0 if since is None else self._kernel.now - since
        retransmits = int(math.log2(silence_s / _RETRANSMIT_S + 1))
        info = bytearray(_INFO_BYTES)
        info[2] = min(retransmits, 255)
        struct.pack_into("I", info, 24, int(self._sent > self._acknowledged))
        struct.pack_into("Q", info, 120, self._acknowledged)
        return bytes(info)

    def _take_end(self) -> None:
        self._at_end = True
        self._changed()

    def _changed(self) -> None:
        for watcher in self.watchers:
            watcher.touch(self)
        self._tell()

    def _tell(self) -> None:
        """Who waits for the socket itself goes on."""
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for fiber in waiting:
                fiber.wake()
        if self.on_change is not None:
            self.process.loop.call_soon(self.on_change)

    # ---- readiness --------------------------------------------------------------------------

    def ready(self, events: int) -> int:
        """Which of the events that a selector watches have come."""
        if self.accepted is not None:
            return events & _READ if self.accepted else 0
        found = 0
        if events & _READ and (self._received or self._at_end or self._error):
            found = _READ
        if events & _WRITE and self.is_writable:
            found |= _WRITE
        return found

    @property
    def is_readable(self) -> bool:
        if self.accepted is not None:
            return bool(self.accepted)
        return bool(self._received or self._at_end or self._error)

    @property
    def is_writable(self) -> bool:
        if self._error:
            return True
        return (
            self._out is not None and not self._is_connecting and self._num_out < self._buffer_bytes
        )

    # ---- the interface of ``socket`` ----------------------------------------------------------

    def fileno(self) -> int:
        return -1 if self._is_closed else self._fd

    def setblocking(self, is_blocking: bool) -> None:
        self._timeout_s = None if is_blocking else 0.0

    def settimeout(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s

    def setsockopt(self, level: int, option: int, value: int) -> None:
        if (level, option) == (real.IPPROTO_TCP, real.TCP_USER_TIMEOUT):
            self._unsent_limit_s = value / 1000

    def getsockopt(self, level: int, option: int, size: int = 0) -> Any:
        """SO_ERROR and TCP_INFO."""
        if option == real.TCP_INFO:
            return self._tcp_info()
        error, self._error = self._error, 0
        if error:
            self._at_end = True
        return error

    def getsockname(self) -> tuple[str, int]:
        host, _, port = self.address.rpartition(":")
        return host, int(port)

    def listen_at(self, host: str) -> None:
        self.accepted = deque()
        self.address = self._net.new_address(host)
        self._net.listeners[self.address] = self

    def accept(self) -> tuple[SimSocket, tuple[str, int]]:
        assert self.accepted is not None
        self._wait(lambda: bool(self.accepted) or self._is_closed)
        if self._is_closed:
            raise OSError(errno.EBADF, "closed")
        sock = self.accepted.popleft()
        return sock, (sock.peer.host if sock.peer else "", 0)

    def connect_ex(self, address: tuple[str, int]) -> int:
        target = f"{address[0]}:{address[1]}"
        self._is_connecting = True
        Pipe(self._net, self.host, address[0]).send(self._reach, target)
        return errno.EINPROGRESS

    def connect(self, address: tuple[str, int]) -> None:
        self.connect_ex(address)
        self._wait(lambda: not self._is_connecting)
        if self._error:
            raise OSError(self.getsockopt(real.SOL_SOCKET, real.SO_ERROR), "cannot connect")

    def send(self, data: Any) -> int:
        if self._is_closed or self._error or self._is_forgotten:
            self._check()
        kernel = self._kernel
        if kernel.fiber is not None:
            kernel.maybe_preempt()
        out = self._out
        if self._error or out is None or self._num_out >= self._buffer_bytes or self._is_connecting:
            self._wait(lambda: self.is_writable or self._is_closed)
            self._check()
            out = self._out
        assert self.peer is not None
        assert out is not None
        sent = bytes(data)
        size = len(sent)
        if size > self._buffer_bytes - self._num_out:
            size = self._buffer_bytes - self._num_out
            sent = sent[:size]
        if size > 1 and kernel.rng.random() < _PART_CHANCE:
            size = kernel.rng.randrange(1, size)  # the kernel takes a part
            sent = sent[:size]
        self._num_out += size
        self._sent += size
        if self._unacknowledged_at is None:
            self._unacknowledged_at = kernel.now
        out.send(self.peer._take, sent)
        if self._unsent_limit_s and out.is_held and not self._is_timed:
            self._is_timed = True
            kernel.after(self._unsent_limit_s, self._give_up, out.num_healed)
        return size

    def sendall(self, data: Any) -> None:
        view = memoryview(data)
        while view:
            view = view[self.send(view) :]

    def sendmsg(self, buffers: Sequence[Any]) -> int:
        return self.send(b"".join(buffers))

    def recv(self, size: int) -> bytes:
        if not self._received and not self._await_input():
            return b""
        data = bytes(self._received[:size])
        del self._received[:size]
        self._taken(len(data))
        return data

    def recv_into(self, view: memoryview) -> int:
        received = self._received
        if not received and not self._await_input():
            return 0
        size = len(view)
        if size < len(received):
            view[:] = received[:size]
        else:
            size = len(received)
            view[:size] = received
        del received[:size]
        self._taken(size)
        return size

    def _await_input(self) -> bool:
        """Block until there is something to read; False at the end of the stream."""
        if self._timeout_s == 0.0 and not (self._at_end or self._error or self._is_closed):
            raise BlockingIOError
        self._wait(lambda: self.is_readable or self._is_closed)
        if not self._received:
            self._check()
        return bool(self._received)

    def _taken(self, size: int) -> None:
        """So many bytes were read: the other end may send as many more."""
        peer = self.peer
        if peer is not None:
            was_full = peer._num_out >= peer._buffer_bytes
            peer._num_out -= size
            if was_full and peer._num_out < peer._buffer_bytes:
                peer._changed()

    def shutdown(self, how: int) -> None:
        if self.accepted is not None:
            self._stop_listening()
        elif self._is_forgotten:
            pass
        elif self._out is not None and self.peer is not None and not self._sent_end:
            self._sent_end = True
            self._out.send(self.peer._take_end)
        if how == real.SHUT_RDWR:
            self._at_end = True
        self._changed()

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self.process.sockets.pop(self, None)
        self._net.connections.pop(self, None)
        if self.accepted is not None:
            self._stop_listening()
        elif self._out is not None and self.peer is not None and not self._is_forgotten:
            if self._received:  # unread input: the peer sees a reset
                self._out.send(self.peer.break_off)
            elif not self._sent_end:
                self._out.send(self.peer._take_end)
        self.watchers.clear()
        self._changed()

    def __enter__(self) -> SimSocket:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _give_up(self, num_healed: int) -> None:
        """Data was not acknowledged within TCP_USER_TIMEOUT."""
        self._is_timed = False
        if self._out is not None and self._out.is_held and self._out.num_healed == num_healed:
            self.break_off(errno.ETIMEDOUT)

    # ---- inside -----------------------------------------------------------------------------

    def _check(self) -> None:
        if self._is_closed:
            raise OSError(errno.EBADF, "closed")
        if self._error or self._is_forgotten:
            raise ConnectionResetError(self._error or errno.EPIPE, "reset by the peer")

    def _wait(self, is_ready: Any) -> None:
        """Block as the socket's timeout says. Raises ``BlockingIOError`` and ``TimeoutError``."""
        kernel = self._kernel
        if kernel.is_over:
            raise OSError(errno.EBADF, "closed")
        deadline = None if self._timeout_s is None else kernel.now + self._timeout_s
        while not is_ready():
            if self._timeout_s == 0.0:
                raise BlockingIOError
            left = None if deadline is None else deadline - kernel.now
            if left is not None and left <= 0:
                raise TimeoutError("timed out")
            fiber = kernel.this_fiber()
            self._waiting.append(fiber)
            fiber.park(left)

    def _stop_listening(self) -> None:
        self._net.listeners.pop(self.address, None)
        while self.accepted:
            self.accepted.popleft().close()

    def _reach(self, target: str) -> None:
        """The request to connect has arrived."""
        listener = self._net.listeners.get(target)
        back = Pipe(self._net, target.rpartition(":")[0], self.host)
        if self._is_closed:
            return
        if listener is None or listener.accepted is None:
            back.send(self._refused)
            return
        before, self._kernel.process = self._kernel.process, listener.process
        other = SimSocket()
        self._kernel.process = before
        other.join(self)
        other.address = target
        listener.accepted.append(other)
        listener._changed()
        assert other._out is not None
        other._out.send(self._connected, other)

    def _connected(self, other: SimSocket) -> None:
        if self._is_closed:
            other.break_off()
            return
        self.join(other)
        self._is_connecting = False
        self._changed()

    def _refused(self) -> None:
        self._is_connecting = False
        self.break_off(errno.ECONNREFUSED)
