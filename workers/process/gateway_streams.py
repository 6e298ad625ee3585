"""The open engine streams of one worker: pending messages and the end of each stream.

An ended stream accepts no commands. If a message cannot be sent, its stream ends, so that a gateway
never misses a message in the middle. Call this module on the loop of ``engine_server`` only. Times
are arguments, in monotonic seconds.

Gateways ping their streams. A gateway that stops pinging counts as a stopped process or host
whose sockets stay open, and its requests are dropped. A caller that never pings is not dropped.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable

from workers.process.intake.commands import (
    AddRequest,
    CopyRequested,
    GatewayDisconnected,
    Inbox,
    MessageReceived,
    PrefetchRequested,
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
"""Longest time without a message from a gateway, which pings every second."""
CHECKS_PER_LIMIT = 5
"""Number of checks for silent gateways in the time of one silence limit."""
MAX_PENDING_MESSAGES = 4096
"""Maximum number of pending messages of a gateway. Above it, the worker ends the stream."""


class GatewayStream:
    """Pending messages of one gateway. ``cancel`` ends the stream if the gateway does not read."""

    def __init__(self, name: str, cancel: Callable[[], object]) -> None:
        self.name = name
        self.cancel = cancel
        self.error = ""
        """Why the worker ends the stream; empty if it does not."""
        self.last_message_at: float | None = None
        """Time of the last message from the gateway; None before its first ping."""
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue(MAX_PENDING_MESSAGES + 1)
        self._is_closed = False

    async def next(self) -> bytes | None:
        """Wait for the next message to the gateway; None after the last one."""
        return await self._queue.get()

    def put(self, message: bytes) -> bool:
        """Queue a message, unless the stream is closed; False if the queue is full."""
        if self._is_closed:
            return True
        if self._queue.qsize() >= MAX_PENDING_MESSAGES:
            return False
        self._queue.put_nowait(message)
        return True

    def close(self, error: str = "") -> None:
        """End the stream after the pending messages, because of ``error``. Idempotent."""
        if not self._is_closed:
            self._is_closed, self.error = True, error
            self._queue.put_nowait(None)


class GatewayStreams:
    """Passes messages between gateways and the inbox, and drops silent or slow gateways.

    Args:
        inbox: receives the gateways' commands.
        silence_limit_s: seconds without a message after which a gateway that pings is dropped.
    """

    def __init__(self, inbox: Inbox, silence_limit_s: float) -> None:
        self._inbox = inbox
        self._streams: dict[str, GatewayStream] = {}
        self._numbers = itertools.count()
        self._limit_s = silence_limit_s
        self.check_interval_s = silence_limit_s / CHECKS_PER_LIMIT
        """Time between two calls of ``drop_silent``."""

    def open(self, gateway: str, cancel: Callable[[], object]) -> GatewayStream:
        """Add and return a stream, with a unique name that starts with ``gateway``."""
        stream = GatewayStream(f"{gateway}#{next(self._numbers)}", cancel)
        self._streams[stream.name] = stream
        return stream

    def handle_message(
        self,
        message: ToEngine,
        stream: GatewayStream,
        now: float,
        hashes: tuple[tuple[BlockHash, ...], ...] = (),
    ) -> None:
        """Pass on a message of a gateway, or reply to a ping; ignored if its stream has ended.

        ``hashes`` are the hashes of KV blocks: of the prompt for a request, and of each open choice
        for a prefetch.
        """
        if self._streams.get(stream.name) is not stream:
            return
        if isinstance(message, Ping) or stream.last_message_at is not None:
            stream.last_message_at = now
        match message:
            case Request():
                self._inbox.put(AddRequest(stream.name, message, now, *hashes[:1]))
            case Prefetch():
                self._inbox.put(PrefetchRequested(stream.name, message.request, hashes))
            case KeepCopy():
                self._inbox.put(CopyRequested(stream.name, message))
            case Abort() | Pause() | SoloStep():
                self._inbox.put(MessageReceived(stream.name, message))
            case Ping():
                self.send(stream.name, message)

    def send(self, name: str, message: FromEngine) -> None:
        """Encode and queue a message. If it cannot be encoded, its stream ends."""
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
        """Queue an encoded message. A full queue drops the gateway; an ended stream is ignored."""
        stream = self._streams.get(name)
        if stream is not None and not stream.put(message):
            self._drop(stream, f"it has not read {MAX_PENDING_MESSAGES} messages")

    def put_all(self, message: bytes) -> None:
        """Queue an encoded message for every gateway."""
        for name in tuple(self._streams):
            self.put(name, message)

    def close_all(self, error: str = "") -> None:
        """End every stream after its pending messages."""
        for stream in self._streams.values():
            stream.close(error)

    def forget(self, stream: GatewayStream) -> None:
        """Remove an ended stream and end its requests. Later calls do nothing."""
        if self._streams.pop(stream.name, None) is not None:
            self._inbox.put(GatewayDisconnected(stream.name))

    def drop_silent(self, now: float, checked_at: float) -> None:
        """Drop silent gateways: a message to one could block its stream indefinitely.

        ``checked_at`` is the time of the last check. While this process is late, messages may be
        unread: that time does not count as silence.
        """
        late_s = now - checked_at - self.check_interval_s
        for stream in tuple(self._streams.values()):
            if stream.last_message_at is None:
                continue
            stream.last_message_at = min(now, stream.last_message_at + max(0.0, late_s))
            if now - stream.last_message_at > self._limit_s:
                self._drop(stream, f"no message for more than {self._limit_s:g} s")

    def _drop(self, stream: GatewayStream, reason: str) -> None:
        logger.warning("%s is dropped: %s", stream.name, reason)
        self.forget(stream)
        stream.close(reason)
        stream.cancel()
