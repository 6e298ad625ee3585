"""The controller's control server: an asyncio TCP server to which workers connect.

A connection is accepted after both ends have proved that they know the cluster token
(``cluster.core.frames``) and have the same release. If a peer sends invalid data, too much data or
no data in time, the server closes its connection. Other connections are not affected.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from dataclasses import dataclass
from typing import Protocol

from cluster.core.addresses import tune_socket
from cluster.core.control_codec import (
    MAX_FRAME_BYTES,
    MAX_HELLO_BYTES,
    decode,
    decode_hello,
    encode,
    frame_length,
)
from cluster.core.errors import HandshakeError, ProtocolError
from cluster.core.frames import ControlChallenge, ControlFrame, ControlHello, ControlProof
from cluster.core.proof import TokenProof
from cluster.core.release import RELEASE, check_release

logger = logging.getLogger(__name__)

HANDSHAKE_LIMIT_S = 5.0
"""Seconds within which a connecting worker must prove that it knows the cluster token."""
MAX_UNPROVED = 256
"""Maximum number of connections in the handshake; a further connection closes the oldest."""
MAX_BACKLOG_BYTES = 2 * MAX_FRAME_BYTES
"""Number of unsent bytes above which the server closes a worker's connection."""
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PREFIX_BYTES = 4


class ControlEvents(Protocol):
    """Receiver of workers' frames and disconnections. Called on the event loop; must not block."""

    def on_frame(self, worker: str, frame: ControlFrame) -> None:
        """Handle a frame of a worker.

        If this raises ``ProtocolError``, the server disconnects the worker.
        """

    def on_closed(self, worker: str, reason: str, is_invalid: bool) -> None:
        """Handle a disconnected worker; not called after ``ControlServer.drop``.

        ``is_invalid``: whether the worker was disconnected because it sent an invalid frame.
        """


@dataclass(eq=False, slots=True)
class _Connection:
    """TCP connection of a worker.

    ``worker``: name of the worker, empty until the handshake succeeds.
    """

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    worker: str = ""

    async def read(self, limit: int) -> bytes:
        """Read the next frame.

        Raises ``ProtocolError`` (also for more than ``limit`` bytes), ``IncompleteReadError``,
        ``OSError``.
        """
        length = frame_length(await self.reader.readexactly(_PREFIX_BYTES), limit)
        return await self.reader.readexactly(length)

    def send(self, data: bytes) -> None:
        """Queue an encoded frame.

        Above ``MAX_BACKLOG_BYTES`` unsent bytes, the connection is closed.
        """
        if self.writer.is_closing():
            return
        self.writer.write(data)
        if self.writer.transport.get_write_buffer_size() > MAX_BACKLOG_BYTES:
            logger.warning("closed the connection of %s, which does not read", self.worker)
            self.writer.transport.abort()


class ControlServer:
    """TCP server of the controller; accepts workers and passes their frames to ``events``."""

    def __init__(
        self,
        token: str,
        events: ControlEvents,
        *,
        handshake_limit_s: float = HANDSHAKE_LIMIT_S,
        release: str = RELEASE,
    ) -> None:
        """``token``: shared secret of the cluster. Workers of another ``release`` are refused."""
        self._token = token
        self._release = release
        self._events = events
        self._handshake_limit_s = handshake_limit_s
        self._server: asyncio.Server | None = None
        self.address = ""
        """Address ``host:port`` on which the server listens; empty before ``start``."""
        self._unproved: dict[_Connection, None] = {}  # the oldest first
        self._workers: dict[str, _Connection] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, host: str) -> str:
        """Listen on a free port of IP address ``host``; return ``host:port``."""
        self._server = await asyncio.start_server(self._serve, host, 0)
        self.address = f"{host}:{self._server.sockets[0].getsockname()[1]}"
        return self.address

    async def close(self) -> None:
        """Close the listener and all connections."""
        if self._server is not None:
            self._server.close()
        for connection in (*self._unproved, *self._workers.values()):
            connection.writer.close()
        self._workers.clear()
        if self._tasks:
            _, stuck = await asyncio.wait(self._tasks, timeout=1.0)
            for task in stuck:
                task.cancel()
            await asyncio.gather(*stuck, return_exceptions=True)

    def is_connected(self, worker: str) -> bool:
        """Return whether the worker has a connection that passed the handshake."""
        return worker in self._workers

    def send(self, frame: ControlFrame, *workers: str) -> None:
        """Send a frame to these workers, encoded once. Workers without a connection are skipped."""
        connected = [self._workers[name] for name in workers if name in self._workers]
        data = encode(frame) if connected else b""
        for connection in connected:
            connection.send(data)

    def drop(self, worker: str) -> None:
        """Close a worker's connection once its queued frames are sent.

        ``ControlEvents.on_closed`` is not called.
        """
        connection = self._workers.pop(worker, None)
        if connection is not None:
            connection.writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        connection = _Connection(reader, writer)
        reason, is_invalid = "closed by the peer", False
        try:
            await self._admit(connection)
            while True:
                frame = decode(await connection.read(MAX_FRAME_BYTES))
                self._hand_over(connection.worker, frame)
        except asyncio.IncompleteReadError:
            pass  # the peer closed the connection
        except (ProtocolError, OSError, TimeoutError) as err:
            reason, is_invalid = str(err) or type(err).__name__, isinstance(err, ProtocolError)
            caller = connection.worker or writer.get_extra_info("peername")
            logger.warning("closed the connection of %s: %s", caller, reason)
        finally:
            self._forget(connection, reason, is_invalid)

    def _hand_over(self, worker: str, frame: ControlFrame) -> None:
        """Pass a frame to ``events``. Errors other than ``ProtocolError`` are only logged."""
        try:
            self._events.on_frame(worker, frame)
        except ProtocolError:
            raise
        except Exception:
            logger.exception("could not handle %s of %s", type(frame).__name__, worker)

    async def _admit(self, connection: _Connection) -> None:
        """Run the handshake within its time limit, then register the connection by worker name.

        If the worker has an older connection, the server closes it.
        """
        if self._server is None or not self._server.is_serving():
            raise HandshakeError("the server has closed")
        self._unproved[connection] = None
        if len(self._unproved) > MAX_UNPROVED:
            oldest = next(iter(self._unproved))
            del self._unproved[oldest]
            oldest.writer.transport.abort()
        tune_socket(connection.writer.get_extra_info("socket"))
        async with asyncio.timeout(self._handshake_limit_s):
            worker = await self._handshake(connection)
        self._unproved.pop(connection, None)
        connection.worker = worker
        self.drop(worker)  # the newer connection wins, as the worker saw the old one break
        self._workers[worker] = connection

    async def _handshake(self, connection: _Connection) -> str:
        """Exchange proofs of the cluster token and compare releases; return the worker's name.

        Raises ``HandshakeError``.
        """
        hello = decode_hello(await connection.read(MAX_HELLO_BYTES))
        if not isinstance(hello, ControlHello) or not _NAME.fullmatch(hello.worker):
            raise HandshakeError("the first frame is not a valid ControlHello")
        proof = TokenProof(self._token, "control", is_caller=False, their_nonce=hello.nonce)
        challenge = ControlChallenge(
            nonce=proof.nonce, proof=proof.make_proof(), release=self._release
        )
        connection.send(encode(challenge))
        answer = decode_hello(await connection.read(MAX_HELLO_BYTES))
        if not isinstance(answer, ControlProof) or not proof.is_peer_proof(answer.proof):
            raise HandshakeError(f"{hello.worker} does not know the cluster token")
        check_release(hello.release, hello.worker, self._release, "the controller")
        return hello.worker

    def _forget(self, connection: _Connection, reason: str, is_invalid: bool) -> None:
        """Remove an ended connection; call ``on_closed`` unless it was dropped or replaced."""
        self._unproved.pop(connection, None)
        with contextlib.suppress(OSError):
            connection.writer.close()
        if self._workers.get(connection.worker) is connection:
            del self._workers[connection.worker]
            self._events.on_closed(connection.worker, reason, is_invalid)
