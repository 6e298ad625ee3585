"""Stand-ins for ``socket`` and ``selectors``: streams over the virtual network."""

from __future__ import annotations

import errno
import math
import selectors
import socket as real
import struct
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from tests.simulation.kernel import Fiber, Kernel
from tests.simulation.network import Network, Pipe

_BUFFER_BYTES = 1 << 18
"""Bytes that may be on their way, or unread, in one direction."""
_RETRANSMIT_S = 0.2
_INFO_BYTES = 128
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


def network() -> Network:
    """The network of the simulation that runs."""
    assert Kernel.current is not None
    return SimSockets.networks[Kernel.current]


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
        self._unsent_limit_s = 0.0
        self._sent = self._delivered = self._acknowledged = 0
        self._unacknowledged_at: float | None = None
        self._at_end = self._is_closed = self._sent_end = self._is_connecting = False
        self._is_timed = False
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

    def _take(self, data: bytes) -> None:
        assert self.peer is not None
        if self._is_closed:
            if self._out is not None and not self.peer._is_closed:
                self._out.send(self.peer.break_off)
            return
        self._received += data
        self.peer._delivered += len(data)
        self.peer._acknowledge()
        self._changed()

    def _acknowledge(self) -> None:
        """What was delivered is acknowledged, if the other direction works."""
        peer = self.peer
        if peer is not None and peer._out is not None and not peer._out.is_blocked:
            self._acknowledged = self._delivered
            if self._acknowledged == self._sent:
                self._unacknowledged_at = None
            elif self._unacknowledged_at is not None:
                self._unacknowledged_at = self._kernel.now

    def _tcp_info(self) -> bytes:
        """``struct tcp_info``: retransmissions, segments under way, acknowledged bytes."""
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
            watcher.wake()
        waiting, self._waiting = self._waiting, []
        for fiber in waiting:
            fiber.wake()
        if self.on_change is not None:
            self.process.loop.call_soon(self.on_change)

    # ---- readiness --------------------------------------------------------------------------

    @property
    def is_readable(self) -> bool:
        if self.accepted is not None:
            return bool(self.accepted)
        return bool(self._received or self._at_end or self._error)

    @property
    def is_writable(self) -> bool:
        if self._error:
            return True
        return self._out is not None and not self._is_connecting and self.num_unsent < _BUFFER_BYTES

    @property
    def num_unsent(self) -> int:
        """Bytes that the other end has not read."""
        return self._num_out

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
        self._check()
        self._kernel.maybe_preempt()
        self._wait(lambda: self.is_writable or self._is_closed)
        self._check()
        assert self.peer is not None
        assert self._out is not None
        room = max(_BUFFER_BYTES - self._num_out, 1)
        sent = bytes(data[:room])
        if len(sent) > 1 and self._kernel.rng.random() < 0.01:
            sent = sent[: self._kernel.rng.randrange(1, len(sent))]  # the kernel takes a part
        self._num_out += len(sent)
        self._sent += len(sent)
        if self._unacknowledged_at is None:
            self._unacknowledged_at = self._kernel.now
        self._out.send(self.peer._take, sent)
        if self._unsent_limit_s and self._out.is_held and not self._is_timed:
            self._is_timed = True
            self._kernel.after(self._unsent_limit_s, self._give_up, self._out.num_healed)
        return len(sent)

    def sendall(self, data: Any) -> None:
        view = memoryview(data)
        while view:
            view = view[self.send(view) :]

    def sendmsg(self, buffers: Sequence[Any]) -> int:
        return self.send(b"".join(buffers))

    def recv(self, size: int) -> bytes:
        if not self._received:
            self._wait(lambda: self.is_readable or self._is_closed)
        if not self._received:
            self._check()
            return b""
        data = bytes(self._received[:size])
        self._read(len(data))
        return data

    def recv_into(self, view: memoryview) -> int:
        if not self._received:
            self._wait(lambda: self.is_readable or self._is_closed)
        if not self._received:
            self._check()
            return 0
        size = min(len(view), len(self._received))
        view[:size] = self._received[:size]
        self._read(size)
        return size

    def shutdown(self, how: int) -> None:
        if self.accepted is not None:
            self._stop_listening()
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
        elif self._out is not None and self.peer is not None:
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

    def _read(self, size: int) -> None:
        del self._received[:size]
        peer = self.peer
        if peer is not None:
            was_full = peer._num_out >= _BUFFER_BYTES
            peer._num_out -= size
            if was_full:
                peer._changed()

    def _check(self) -> None:
        if self._is_closed:
            raise OSError(errno.EBADF, "closed")
        if self._error:
            raise ConnectionResetError(self._error, "reset by the peer")

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


class Key(NamedTuple):
    """``selectors.SelectorKey``."""

    fileobj: Any
    fd: int
    events: int
    data: Any


class SimSelector:
    """``selectors.DefaultSelector``."""

    def __init__(self) -> None:
        self._keys: dict[SimSocket, Key] = {}
        self._fiber: Fiber | None = None

    def register(self, fileobj: Any, events: int, data: Any = None) -> Key:
        sock = self._socket(fileobj)
        if sock in self._keys:
            raise KeyError(f"{fileobj!r} is registered already")
        key = self._keys[sock] = Key(fileobj, sock.fileno(), events, data)
        sock.watchers[self] = None
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> Key:
        sock = self._socket(fileobj)
        if sock not in self._keys:
            raise KeyError(f"{fileobj!r} is not registered")
        key = self._keys[sock] = Key(fileobj, sock.fileno(), events, data)
        return key

    def unregister(self, fileobj: Any) -> Key:
        sock = self._socket(fileobj)
        sock.watchers.pop(self, None)
        return self._keys.pop(sock)

    def select(self, timeout: float | None = None) -> list[tuple[Key, int]]:
        kernel = Kernel.current
        assert kernel is not None
        found = self._ready()
        if found or (timeout is not None and timeout <= 0):
            kernel.maybe_preempt()
            return found or self._ready()
        fiber = kernel.this_fiber()
        self._fiber = fiber
        fiber.park(timeout)
        self._fiber = None
        return self._ready()

    def wake(self) -> None:
        """A watched socket has changed."""
        if self._fiber is not None:
            self._fiber.wake()

    def close(self) -> None:
        for sock in self._keys:
            sock.watchers.pop(self, None)
        self._keys.clear()

    def __enter__(self) -> SimSelector:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ready(self) -> list[tuple[Key, int]]:
        found = []
        for sock, key in self._keys.items():
            events = 0
            if key.events & READ and sock.is_readable:
                events = READ
            if key.events & WRITE and sock.is_writable:
                events |= WRITE
            if events:
                found.append((key, events))
        return found

    def _socket(self, fileobj: Any) -> SimSocket:
        if isinstance(fileobj, SimSocket):
            return fileobj
        return network().by_fd[fileobj.fileno()]


class SimSelectors:
    """In place of the module ``selectors``."""

    DefaultSelector = SimSelector
    BaseSelector = SimSelector
    EVENT_READ = READ
    EVENT_WRITE = WRITE


class _Constants(type):
    """Names in capitals are those of the module."""

    def __getattr__(cls, name: str) -> Any:
        if not name.isupper():
            raise AttributeError(f"the simulated socket module has no {name}")
        return getattr(real, name)


class SimSockets(metaclass=_Constants):
    """In place of the module ``socket``."""

    networks: dict[Kernel, Network] = {}  # noqa: RUF012 (filled and emptied by each simulation)
    socket = SimSocket

    @staticmethod
    def create_server(address: tuple[str, int], **options: Any) -> SimSocket:
        sock = SimSocket()
        sock.listen_at(address[0])
        return sock

    @staticmethod
    def create_connection(address: tuple[str, int], timeout: float | None = None) -> SimSocket:
        sock = SimSocket()
        sock.settimeout(timeout)
        try:
            sock.connect(address)
        except OSError:
            sock.close()
            raise
        return sock

    @staticmethod
    def socketpair() -> tuple[SimSocket, SimSocket]:
        first, second = SimSocket(), SimSocket()
        first.join(second)
        second.join(first)
        return first, second

    @staticmethod
    def getaddrinfo(host: str, port: int, type: int = 0) -> list[Any]:
        return [(real.AF_INET, real.SOCK_STREAM, 0, "", (host, port))]

    @staticmethod
    def gethostname() -> str:
        process = network().kernel.process
        return process.host if process else "nowhere"
