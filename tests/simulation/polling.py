"""Stand-ins for the modules ``socket`` and ``selectors``."""

from __future__ import annotations

import selectors
import socket as real
from typing import Any, NamedTuple

from tests.simulation.kernel import Fiber, Kernel
from tests.simulation.network import network
from tests.simulation.sockets import SimSocket

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


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
        self._touched: dict[SimSocket, None] = {}
        """Sockets that may be ready; the others have not changed since they were not."""
        self._fiber: Fiber | None = None

    def register(self, fileobj: Any, events: int, data: Any = None) -> Key:
        sock = self._socket(fileobj)
        if sock in self._keys:
            raise KeyError(f"{fileobj!r} is registered already")
        key = self._keys[sock] = Key(fileobj, sock.fileno(), events, data)
        sock.watchers[self] = self._touched[sock] = None
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> Key:
        sock = self._socket(fileobj)
        if sock not in self._keys:
            raise KeyError(f"{fileobj!r} is not registered")
        key = self._keys[sock] = Key(fileobj, sock.fileno(), events, data)
        self._touched[sock] = None
        return key

    def unregister(self, fileobj: Any) -> Key:
        sock = self._socket(fileobj)
        sock.watchers.pop(self, None)
        self._touched.pop(sock, None)
        return self._keys.pop(sock)

    def select(self, timeout: float | None = None) -> list[tuple[Key, int]]:
        kernel = Kernel.current
        assert kernel is not None
        found = self._ready() if self._touched else []
        if found or (timeout is not None and timeout <= 0):
            kernel.maybe_preempt()
            return found or self._ready()
        fiber = kernel.this_fiber()
        self._fiber = fiber
        fiber.park(timeout)
        self._fiber = None
        return self._ready() if self._touched else []

    def touch(self, sock: SimSocket) -> None:
        """A watched socket has changed."""
        self._touched[sock] = None
        if self._fiber is not None:
            self._fiber.wake()

    def close(self) -> None:
        for sock in self._keys:
            sock.watchers.pop(self, None)
        self._keys.clear()
        self._touched.clear()

    def __enter__(self) -> SimSelector:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ready(self) -> list[tuple[Key, int]]:
        found = []
        for sock in list(self._touched):
            key = self._keys[sock]
            if events := sock.ready(key.events):
                found.append((key, events))
            else:
                del self._touched[sock]
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
