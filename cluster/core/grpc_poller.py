"""gRPC's poller thread, which all event loops of a process share."""

from __future__ import annotations

import array
import asyncio
import fcntl
import socket
import termios
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc.aio


def keep_grpc_poller() -> None:
    """Keep gRPC's poller running until the process ends, and its events from piling up.

    Call this on an event loop, before gRPC has a channel or server there.

    gRPC stops the poller when the last channel, call or server of the process is deleted. The event
    loop that deletes it then joins the poller's thread, which can block the loop forever. Source:
    pull request 40989 of grpc/grpc; a comment in its issue 22365 describes this remedy.

    The poller writes a byte to a pipe for each event, and gRPC's handler reads one byte in an
    iteration of the loop. After a burst of events, each further event takes a whole iteration, the
    pipe fills and the poller waits: a gateway that accepted thousands of calls took messages of its
    workers seconds late. Here, the handler runs for all bytes of the pipe in one iteration.
    """
    loop: Any = asyncio.get_running_loop()
    add_reader = loop.add_reader

    def add_eager_reader(pipe: socket.socket, handle: Callable[[], None]) -> None:
        add_reader(pipe, _handle_all, pipe, handle)

    loop.add_reader = add_eager_reader
    try:
        getattr(grpc.aio, "init_grpc_aio")()  # noqa: B009 (its stubs lack it)
    finally:
        del loop.add_reader


def _handle_all(pipe: socket.socket, handle: Callable[[], None]) -> None:
    """Call ``handle``, which reads one byte, for each byte of ``pipe``."""
    num_bytes = array.array("i", [1])
    with suppress(OSError):  # another version of gRPC may have no pipe
        fcntl.ioctl(pipe, termios.FIONREAD, num_bytes)
    with suppress(BlockingIOError):  # another loop may have read bytes
        for _ in range(num_bytes[0]):
            handle()
