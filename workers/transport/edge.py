"""An edge: a nonblocking connection between two workers that sends and receives frames."""

from __future__ import annotations

import selectors
import socket
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster.core.errors import ProtocolError
from workers.transport.frames import HEADER_BYTES, Frame, FrameHeader, FrameKind
from workers.transport.handshake import PeerIdentity

_READ = selectors.EVENT_READ
_MAX_BUFFERS = 64
"""Maximum number of buffers that one system call sends."""


class StepFrame(NamedTuple):
    """A received frame with a step proposal or step header, and its sender."""

    sender: PeerIdentity
    frame: Frame


class GroupFrames:
    """Received step frames of one step group, and the number of its current step."""

    def __init__(self) -> None:
        self.step_frames: deque[StepFrame] = deque()
        """Received proposals and step headers of the current generation, in order of arrival."""
        self.current_step = 0
        """Number of the current step. Data frames of earlier steps are dropped."""


class Edge:
    """An authenticated TCP connection to another worker, which carries frames. Data thread only.

    A partly sent frame stays queued even if its step is aborted; the receiver drops frames of an
    older generation. Bytes that the kernel does not accept immediately are copied, so callers may
    reuse their memory when ``send`` returns.
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: PeerIdentity,
        *,
        generation: int,
        kinds: frozenset[FrameKind],
        max_data_bytes: int,
    ) -> None:
        self.sock = sock
        self.peer = peer
        self.name = peer.name
        self.generation = generation
        """Generation in which the edge was opened; frames of older generations are invalid."""
        self.frames = GroupFrames()
        """Step frames of the peer's step group, on the edge table."""
        self.inbox: deque[Frame] = deque()
        """Received data frames that were not taken yet, in the order of arrival."""
        self.inbox_bytes = 0
        self.out_bytes = 0
        """Number of bytes that are queued to be sent."""
        self.interest = 0
        """Events for which the selector watches the socket; 0 if it is closed or not watched."""
        self._kinds = kinds
        self._max_data_bytes = max_data_bytes
        self._out: deque[memoryview] = deque()
        self._head = memoryview(bytearray(HEADER_BYTES))
        self._header: FrameHeader | None = None
        self._payload: NDArray[np.uint8] = np.empty(0, dtype=np.uint8)
        self._view = self._head
        self._have = 0
        self._given_back = memoryview(b"")

    @property
    def is_clear(self) -> bool:
        """Whether the selector reads the edge, and no received or unsent bytes are kept here."""
        is_waiting = self.inbox or self._out or self._have or self._given_back
        return self.interest == _READ and self._header is None and not is_waiting

    def send(self, buffers: Sequence[memoryview | bytes]) -> None:
        """Send the bytes that the kernel accepts now, and queue a copy of the rest.

        Raises ``OSError`` if the connection is broken.
        """
        if self._out:
            self.flush()
        sent = 0 if self._out else self._send_now(buffers)
        if sent < sum(map(len, buffers)):
            self.keep(buffers, sent)

    def keep(self, buffers: Sequence[memoryview | bytes], sent: int = 0) -> None:
        """Queue a copy of ``buffers`` to be sent, without their first ``sent`` bytes."""
        for buffer in buffers:
            if sent < len(buffer):
                rest = memoryview(bytes(memoryview(buffer)[sent:]))
                self._out.append(rest)
                self.out_bytes += len(rest)
            sent = max(sent - len(buffer), 0)

    def flush(self) -> None:
        """Send queued bytes as far as the kernel accepts them now.

        Raises ``OSError`` if the connection is broken.
        """
        while self._out:
            sent = self._send_now(tuple(islice(self._out, _MAX_BUFFERS)))
            if not sent:
                return
            self.out_bytes -= sent
            if not self.out_bytes:
                self._out.clear()
                return
            while sent:
                head = self._out[0]
                if sent < len(head):
                    self._out[0] = head[sent:]
                    break
                sent -= len(head)
                self._out.popleft()

    def _send_now(self, buffers: Sequence[memoryview | bytes]) -> int:
        """Send buffers; return the number of bytes that the kernel accepted."""
        try:
            return self.sock.sendmsg(buffers)
        except BlockingIOError:
            return 0

    def read(self) -> Frame | None:
        """Receive without waiting; return the next frame if it is complete, else None.

        Raises ``ProtocolError`` for an invalid header and ``OSError`` if the connection has ended.
        """
        while True:
            if self._have < len(self._view):
                try:
                    got = self._receive(self._view[self._have :])
                except BlockingIOError:
                    return None
                if got == 0:
                    raise ConnectionResetError("closed by the peer")
                self._have += got
                if self._have < len(self._view):
                    continue
            if self._header is not None:
                frame = Frame(self._header, self._payload)
                self._header = None
                self._view, self._have = self._head, 0
                return frame
            self._begin_payload(FrameHeader.decode(self._head, self._max_data_bytes))

    def give_back(self, data: bytes) -> None:
        """Make ``read`` continue with ``data``, bytes that native code received and cannot use.

        Data of an earlier call must have been read.
        """
        assert not self._given_back
        self._given_back = memoryview(data)

    @property
    def has_given_back(self) -> bool:
        """Whether data passed to ``give_back`` is still unread."""
        return bool(self._given_back)

    def _receive(self, view: memoryview) -> int:
        count = min(len(self._given_back), len(view))
        if not count:
            return self.sock.recv_into(view)
        view[:count], self._given_back = self._given_back[:count], self._given_back[count:]
        return count

    def _begin_payload(self, header: FrameHeader) -> None:
        if header.kind not in self._kinds:
            raise ProtocolError(f"{header.kind.name} frame from a worker of role {self.peer.role}")
        self._header = header
        self._payload = np.empty(header.length, dtype=np.uint8)
        self._view, self._have = self._payload.data, 0

    def put(self, frame: Frame) -> None:
        """Add a received data frame to the inbox."""
        self.inbox.append(frame)
        self.inbox_bytes += frame.header.length

    def pop(self) -> Frame:
        """Remove and return the oldest data frame of the inbox, which must not be empty."""
        frame = self.inbox.popleft()
        self.inbox_bytes -= frame.header.length
        return frame

    def close(self) -> None:
        """Close the connection and drop bytes that are queued to be sent."""
        self._out.clear()
        self.out_bytes = 0
        self.sock.close()
