"""A subscriber to KV events, by the definition of the messages alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import zmq

from benchmarks.harness.stalls import Limit

_POLL_MS = 50
_LIMIT_S = 60


class Subscriber:
    """Receives messages, and asks for those that it missed."""

    def __init__(self, endpoint: str, replay: str = "", topic: str = "") -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._events = self._context.socket(zmq.SUB)
        self._events.setsockopt_string(zmq.SUBSCRIBE, topic)
        self._events.connect(endpoint)
        self._replay = replay
        self.topics: set[bytes] = set()

    def __enter__(self) -> Subscriber:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._context.destroy(linger=0)

    def next(self, act: Callable[[], object] = lambda: None) -> tuple[int, bytes]:
        """Number and payload of the next message; ``act`` is done again until there is one."""
        limit = Limit(_LIMIT_S)
        while not self._events.poll(_POLL_MS):
            assert not limit.is_over(), "no message"
            act()
        topic, number, payload = self._events.recv_multipart()
        self.topics.add(topic)
        return int.from_bytes(number, "big"), payload

    def has_more(self) -> bool:
        return bool(self._events.poll(_POLL_MS))

    def replayed(self, first: int) -> list[tuple[int, bytes]]:
        """Number and payload of the messages that are kept, from a number on."""
        with self._question() as socket:
            socket.send_multipart((b"", first.to_bytes(8, "big")))
            found: list[tuple[int, bytes]] = []
            while True:
                assert socket.poll(1000 * _LIMIT_S), "no answer"
                empty, topic, number, payload = socket.recv_multipart()
                assert not empty
                if number == (-1).to_bytes(8, "big", signed=True):
                    assert (topic, payload) == (b"", b"")
                    return found
                found.append((int.from_bytes(number, "big"), payload))

    def send_rubbish(self, *frames: bytes) -> None:
        """Ask a question that is none."""
        with self._question() as socket:
            socket.send_multipart(frames)

    @contextmanager
    def _question(self) -> Iterator[zmq.Socket[bytes]]:
        socket = self._context.socket(zmq.DEALER)  # of a REQ's answers only the first is read
        socket.connect(self._replay)
        yield socket
        socket.close(linger=1000)
