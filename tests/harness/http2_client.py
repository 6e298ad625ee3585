"""An HTTP/2 client of hand-made frames, which does what no library does: it reads nothing.

Source: RFC 9113 (frames), RFC 7541 (header fields as literals, without Huffman codes or a table).
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType

from benchmarks.harness.stalls import wait_until

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What an HTTP/2 client begins with; frames follow."""
DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 8, 9
END_STREAM, END_HEADERS, ACK = 1, 4, 1
CANCEL = 8
_HEADER_TABLE_SIZE, _INITIAL_WINDOW_SIZE = 1, 4
_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Frame:
    kind: int
    flags: int
    stream: int
    payload: bytes

    def encode(self) -> bytes:
        """The frame as it is sent."""
        head = struct.pack(">I", len(self.payload))[1:] + bytes((self.kind, self.flags))
        return head + struct.pack(">I", self.stream) + self.payload


def literal(name: str, value: str) -> bytes:
    """A header field that is not to be indexed."""
    return b"\0" + b"".join(_text(text.encode()) for text in (name, value))


def _text(text: bytes) -> bytes:
    """A text with its length, an integer with a prefix of 7 bits."""
    if len(text) < 127:
        return bytes((len(text),)) + text
    length, rest = b"\x7f", len(text) - 127
    while rest >= 128:
        length += bytes((rest % 128 + 128,))
        rest //= 128
    return length + bytes((rest,)) + text


def message(content: bytes) -> bytes:
    """A gRPC message, not compressed."""
    return b"\0" + struct.pack(">I", len(content)) + content


@dataclass
class Http2Client:
    """One connection; a thread reads the frames and acknowledges settings and pings.

    Args:
        target: ``host:port``.
        window: bytes that the server may send on each stream.
    """

    target: str
    window: int = 0
    frames: list[Frame] = field(default_factory=list)
    """All that came."""
    is_closed: bool = False
    """The server has closed the connection."""

    def __enter__(self) -> Http2Client:
        host, _, port = self.target.rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        self._next_stream = 1
        settings = struct.pack(">HIHI", _HEADER_TABLE_SIZE, 0, _INITIAL_WINDOW_SIZE, self.window)
        self._socket.sendall(PREFACE)
        self.send(Frame(SETTINGS, 0, 0, settings))
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(_LIMIT_S)
        self._socket.close()

    def send(self, frame: Frame) -> None:
        """Send a frame as it is."""
        self._socket.sendall(frame.encode())

    def call(
        self, path: str, content: bytes | None, metadata: Iterable[tuple[str, str]] = ()
    ) -> int:
        """Begin a gRPC call, and send its one message (None: no message); returns the stream."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "test")]
        fields += [("content-type", "application/grpc"), ("te", "trailers"), *metadata]
        block = b"".join(literal(name, value) for name, value in fields)
        self.send(Frame(HEADERS, END_HEADERS, stream, block))
        if content is not None:
            self._send_message(stream, message(content))
        return stream

    def _send_message(self, stream: int, data: bytes) -> None:
        """In frames, as far as the windows that servers begin with."""
        for start in range(0, len(data), 16_384):
            piece = data[start : start + 16_384]
            is_last = start + 16_384 >= len(data)
            self.send(Frame(DATA, END_STREAM * is_last, stream, piece))

    def open_window(self, stream: int, num_bytes: int) -> None:
        """Let the server send more on a stream."""
        self.send(Frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", num_bytes)))

    def cancel(self, stream: int) -> None:
        self.send(Frame(RST_STREAM, 0, stream, struct.pack(">I", CANCEL)))

    def status(self, stream: int) -> int | None:
        """The gRPC status of a call; None while it runs."""
        name = literal("grpc-status", "")[1:-1]
        for frame in self._of(stream):
            if frame.kind == HEADERS and name in frame.payload:
                length, *rest = frame.payload.partition(name)[2]
                return int(bytes(rest[:length]))
        return None

    def has_begun(self, stream: int) -> bool:
        """The server has answered with headers."""
        return any(frame.kind == HEADERS for frame in self._of(stream))

    def data(self, stream: int) -> bytes:
        """What came of the body."""
        return b"".join(f.payload for f in self._of(stream) if f.kind == DATA)

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        wait_until(condition, what, _LIMIT_S)

    def wait_status(self, stream: int) -> int:
        """The gRPC status of a call, once it has ended."""
        self.wait_for(lambda: self.status(stream) is not None, f"the end of stream {stream}")
        status = self.status(stream)
        assert status is not None
        return status

    def _of(self, stream: int) -> list[Frame]:
        return [frame for frame in list(self.frames) if frame.stream == stream]

    def _read(self) -> None:
        unread = b""
        with contextlib.suppress(OSError):
            while data := self._socket.recv(65_536):
                unread += data
                while len(unread) >= 9 and len(unread) >= 9 + int.from_bytes(unread[:3], "big"):
                    end = 9 + int.from_bytes(unread[:3], "big")
                    kind, flags = unread[3:5]
                    stream = int.from_bytes(unread[5:9], "big")
                    self._take(Frame(kind, flags, stream, unread[9:end]))
                    unread = unread[end:]
        self.is_closed = True

    def _take(self, frame: Frame) -> None:
        self.frames.append(frame)
        if frame.kind in (SETTINGS, PING) and not frame.flags & ACK:
            answer = frame.payload if frame.kind == PING else b""
            self.send(Frame(frame.kind, ACK, 0, answer))
