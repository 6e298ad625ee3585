"""The open engine streams of one worker: what waits for each gateway, and when a stream ends.

A stream that has ended takes no more commands, and sends nothing after what it could not send: a
gateway never misses a message in the middle. Belongs to the loop of ``engine_server``; times are
passed in, as monotonic seconds.

Gateways ping their streams. The requests of a gateway that stops pinging are dropped: its process
or host is stopped, with all sockets open. Other callers of the engine stream, which never pinged,
may stay silent.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable

from workers.process.intake.commands import (
    AddRequest,
    CopyAsked,
    GatewayGone,
    Inbox,
    MessageTaken,
    PrefetchAsked,
)
from workers.requests.block_hash import BlockHash
from workers.requests.request import Request, SoloStep
from workers.requests.wire import (
    FROM_ENGINE,
    Abort,
    FromEngine,
    KeepCopy,
    Pause,
    Ping,
    Prefetch,
    ToEngine,
)

logger = logging.getLogger(__name__)

GATEWAY_SILENCE_LIMIT_S = 5.0
"""Longest silence of a gateway, which pings every second."""
LOOKS_PER_LIMIT = 5
"""Checks within one limit."""
MAX_STEPS_BEHIND = 4096
"""Messages that may wait for one gateway; a gateway further behind loses its stream."""


class GatewayStream:
    """One gateway's stream. ``cancel`` ends its handler, which may be blocked by the gateway."""

    def __init__(self, name: str, cancel: Callable[[], object]) -> None:
        self.name = name
        self.cancel = cancel
        self.error = ""
        """Why this side ends it; empty: it does not, or the worker ends."""
        self.heard_at: float | None = None
        """Time of the last message; None before the first ping."""
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue(MAX_STEPS_BEHIND + 1)
        self._is_closed = False

    async def next(self) -> bytes | None:
        """The next message to the gateway; None after the last one."""
        return await self._queue.get()

    def put(self, message: bytes) -> bool:
        """Queue a message, unless the stream is closed; False when too many wait."""
        if self._is_closed:
            return True
        if self._queue.qsize() >= MAX_STEPS_BEHIND:
            return False
        self._queue.put_nowait(message)
        return True

    def close(self, error: str = "") -> None:
        """End the stream after the messages that wait; only the first reason counts."""
        if not self._is_closed:
            self._is_closed, self.error = True, error
            self._queue.put_nowait(None)


class GatewayStreams:
    """The open streams by name.

    Args:
        inbox: where the gateways' commands go.
        silence_limit_s: a gateway that has pinged and then sends nothing for this time is dropped.
    """

    def __init__(self, inbox: Inbox, silence_limit_s: float) -> None:
        self._inbox = inbox
        self._streams: dict[str, GatewayStream] = {}
        self._numbers = itertools.count()
        self._limit_s = silence_limit_s
        self.pause_s = silence_limit_s / LOOKS_PER_LIMIT
        """Time between two calls of ``drop_silent``."""

    def open(self, gateway: str, cancel: Callable[[], object]) -> GatewayStream:
        """A new stream, under a name of its own."""
        stream = GatewayStream(f"{gateway}#{next(self._numbers)}", cancel)
        self._streams[stream.name] = stream
        return stream

    def take(
        self,
        message: ToEngine,
        stream: GatewayStream,
        now: float,
        hashes: tuple[tuple[BlockHash, ...], ...] = (),
    ) -> None:
        """A message of a gateway.

        A request comes with the ``hashes`` of its prompt's KV blocks, one to be prefetched with
        those of each open choice.

        What a gateway sent before its stream ended, and was read after that, is for nobody.
        """
        if self._streams.get(stream.name) is not stream:
            return
        if isinstance(message, Ping) or stream.heard_at is not None:
            stream.heard_at = now
        match message:
            case Request():
                self._inbox.put(AddRequest(stream.name, message, now, *hashes[:1]))
            case Prefetch():
                self._inbox.put(PrefetchAsked(stream.name, message.request, hashes))
            case KeepCopy():
                self._inbox.put(CopyAsked(stream.name, message))
            case Abort() | Pause() | SoloStep():
                self._inbox.put(MessageTaken(stream.name, message))
            case Ping():
                self.send(stream.name, message)

    def send(self, name: str, message: FromEngine) -> None:
        """Encode and put a message; one that cannot be encoded ends its stream."""
        stream = self._streams.get(name)
        if stream is None:
            return
        try:
            data = FROM_ENGINE.encode(message)
        except Exception:
            logger.exception("%s: a message could not be encoded", name)
            self._drop(stream, "a message could not be encoded")
            return
        self.put(name, data)

    def put(self, name: str, message: bytes) -> None:
        """Send a message; a gateway too far behind is dropped. A stream that ended is ignored."""
        stream = self._streams.get(name)
        if stream is not None and not stream.put(message):
            self._drop(stream, f"{MAX_STEPS_BEHIND} messages behind")

    def put_all(self, message: bytes) -> None:
        """Send a message to every gateway."""
        for name in tuple(self._streams):
            self.put(name, message)

    def close_all(self, error: str = "") -> None:
        """End every stream after the messages that wait."""
        for stream in self._streams.values():
            stream.close(error)

    def forget(self, stream: GatewayStream) -> None:
        """The stream has ended: its requests end, once."""
        if self._streams.pop(stream.name, None) is not None:
            self._inbox.put(GatewayGone(stream.name))

    def drop_silent(self, now: float, looked_at: float) -> None:
        """Drop gateways that are silent; a message to one could block its stream for ever.

        ``looked_at`` is the time of the last check. If this process was stopped in between,
        messages of that time may still be unread.
        """
        late_s = now - looked_at - self.pause_s
        for stream in tuple(self._streams.values()):
            if stream.heard_at is None:
                continue
            if late_s > self.pause_s:
                stream.heard_at = min(now, stream.heard_at + late_s)
            if now - stream.heard_at > self._limit_s:
                self._drop(stream, f"too long without a ping (over {self._limit_s:g} s)")

    def _drop(self, stream: GatewayStream, reason: str) -> None:
        logger.warning("%s is dropped: %s", stream.name, reason)
        self.forget(stream)
        stream.close(reason)
        stream.cancel()
