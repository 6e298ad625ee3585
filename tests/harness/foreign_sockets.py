"""Faults at the sockets of another process, which cannot notice who makes them."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import psutil
import pytest

_PIDFD_GETFD = 438
"""Number of the system call, the same on every architecture; Linux 5.6."""
_ALL = 2**31 - 1


def deafen(receiver: int, sender: int) -> None:
    """A process gets nothing more of what another sends it; both are process ids of this host.

    Its kernel takes and acknowledges all bytes, and does not show them to the process: no
    connection breaks, and no look at one shows a fault. Skips where this is not allowed.
    """
    for number in _connections(receiver, sender):
        with _socket_of(receiver, number) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, _ALL)


def hang_up(one: int, other: int) -> None:
    """Each connection between two processes of this host ends for both. Skips as ``deafen``."""
    with ExitStack() as stack:
        numbers = _connections(one, other)
        for sock in [stack.enter_context(_socket_of(one, number)) for number in numbers]:
            with suppress(OSError):  # the other one may have ended for that
                sock.shutdown(socket.SHUT_RDWR)


def _connections(one: int, other: int) -> list[int]:
    """Descriptors in a process of its TCP connections to another one."""
    ends = {(c.laddr, c.raddr) for c in psutil.Process(other).net_connections("tcp") if c.raddr}
    found = [
        connection.fd
        for connection in psutil.Process(one).net_connections("tcp")
        if (connection.raddr, connection.laddr) in ends
    ]
    assert found, f"no connection from process {other} to {one}"
    return found


@contextmanager
def _socket_of(pid: int, number: int) -> Iterator[socket.socket]:
    """A socket of another process, by its descriptor there."""
    process = os.pidfd_open(pid)
    try:
        here = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, process, number, 0)
        if here < 0:
            why = os.strerror(ctypes.get_errno())
            pytest.skip(f"sockets of another process cannot be reached: {why}")
        with socket.socket(fileno=here) as sock:
            yield sock
    finally:
        os.close(process)
