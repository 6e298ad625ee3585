"""Helpers for sockets: reads of an exact size, and a pipe to wake a thread that waits in select."""

from __future__ import annotations

import contextlib
import socket
import time

_DRAIN_BYTES = 4096


def receive_exactly(sock: socket.socket, view: memoryview, deadline_s: float | None = None) -> None:
    """Fill ``view`` from a blocking socket before ``deadline_s`` (``time.monotonic``), if given.

    Raises ``ConnectionError`` at the end of the stream, and ``TimeoutError``.
    """
    done = 0
    while done < len(view):
        if deadline_s is not None:
            sock.settimeout(time_left(deadline_s))
        count = sock.recv_into(view[done:])
        if not count:
            raise ConnectionError("closed the connection")
        done += count


def receive_bytes(sock: socket.socket, size: int, deadline_s: float | None = None) -> bytearray:
    """Receive exactly ``size`` bytes from a blocking socket, before ``deadline_s`` if given.

    Raises the errors of ``receive_exactly``.
    """
    data = bytearray(size)
    receive_exactly(sock, memoryview(data), deadline_s)
    return data


def time_left(deadline_s: float) -> float:
    """Return the seconds until the monotonic time ``deadline_s``.

    Raises ``TimeoutError`` if the deadline has passed.
    """
    left = deadline_s - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


class WakePipe:
    """Pipe with which any thread can wake another thread that watches it in a select call."""

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)

    def fileno(self) -> int:
        """File descriptor that a selector watches for reading."""
        return self._read.fileno()

    def ring(self) -> None:
        """Wake the thread that watches the pipe; do nothing after ``close``."""
        with contextlib.suppress(OSError):  # full: the thread wakes anyway; closed: none watches
            self._write.send(b"w")

    def drain(self) -> None:
        """Discard all earlier calls of ``ring``, so that the next select waits again."""
        with contextlib.suppress(BlockingIOError):
            while self._read.recv(_DRAIN_BYTES):
                pass

    def wait(self, timeout_s: float) -> None:
        """Block until ``ring`` is called, for at most ``timeout_s``."""
        self._read.settimeout(timeout_s)
        with contextlib.suppress(TimeoutError):
            self._read.recv(_DRAIN_BYTES)
        self._read.setblocking(False)

    def close(self) -> None:
        self._read.close()
        self._write.close()
