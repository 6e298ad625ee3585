"""Limits of one gRPC port: the number of concurrent calls, and the time to wait for clients.

gRPC's own limit (``maximum_concurrent_rpcs``) counts all calls alike, so that idle streams without
a key could exhaust it. gRPC has no time limit for clients that do not send or read messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from cluster.core.errors import DeadlineExceededError, QueueFullError
from gateway.core.errors import ErrorReport, SlowClientError
from gateway.core.tuning import GatewayTuning

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Callable[[Any, Context], Awaitable[None]]
"""Serves a call: the stream of its requests, which no handler here uses, and the call itself."""

MAX_UNREAD_PER_CONNECTION = 32
"""Maximum number of ended calls of one connection whose last message the client has not read. gRPC
keeps such calls, and a server cannot cancel them."""
MAX_STREAMS = 64
"""Maximum number of endless streams (``WatchCluster``, reflection) of one port."""
_BURST_S = 1.0
"""Age in seconds from which a call may be ended in favour of newer calls."""


def freed_when_aborted(serve: Handler) -> Handler:
    """Make a handler whose calls are freed when they are aborted.

    gRPC keeps the error of ``context.abort`` in the state of the call. With the frames of the
    error's traceback, which refer to the call, that is a cycle that only the garbage collector
    frees.
    """

    async def handle(requests: Any, context: Context) -> None:
        try:
            await serve(requests, context)
        except grpc.aio.AbortError as err:
            del requests, context
            err.__context__ = None
            raise err.with_traceback(None) from None

    return handle


class CallPool:
    """Limits the number of calls whose duration depends on the client.

    Above ``max_calls``, each new call ends the oldest call of the connection with the most calls,
    so that no client can block other clients. Calls younger than ``burst_s`` seconds are not ended,
    so the pool may exceed its limit for that time.
    """

    def __init__(self, max_calls: int, burst_s: float = _BURST_S) -> None:
        self._max_calls = max_calls
        self._burst_s = burst_s
        self._calls: dict[asyncio.Timeout, tuple[str, float]] = {}

    def __len__(self) -> int:
        return len(self._calls)

    @contextlib.asynccontextmanager
    async def entered(self, peer: str, limit_s: float = math.inf) -> AsyncIterator[None]:
        """Run a call of a connection for at most ``limit_s`` seconds.

        Raises:
            DeadlineExceededError: the call has lasted ``limit_s``.
            QueueFullError: the call was ended in favour of a newer call.
        """
        now_s = asyncio.get_running_loop().time()
        while len(self._calls) >= self._max_calls and self._end_one(now_s):
            pass
        timer = asyncio.timeout(None if limit_s == math.inf else limit_s)
        try:
            async with timer:
                self._calls[timer] = peer, now_s
                yield
        except TimeoutError as err:
            if not timer.expired():
                raise
            if timer in self._calls:
                raise DeadlineExceededError(f"the call has lasted {limit_s:g} s", True) from err
            raise QueueFullError("the call was ended in favour of newer calls") from err
        finally:
            self._calls.pop(timer, None)

    def _end_one(self, now_s: float) -> bool:
        """End the oldest call of the connection with the most calls. Return False if no call is
        old enough."""
        old = [
            timer
            for timer, (_, since_s) in self._calls.items()
            # an expired one is ending already, and cannot be rescheduled
            if now_s - since_s >= self._burst_s and not timer.expired()
        ]
        if not old:
            return False
        numbers = Counter(peer for peer, _ in self._calls.values())
        timer = max(old, key=lambda t: numbers[self._calls[t][0]])  # the first of equal ones
        del self._calls[timer]
        timer.reschedule(now_s)
        return True


class UnreadCalls:
    """Counts, by connection, ended calls whose last message the client has not read."""

    def __init__(self, max_calls: int = MAX_UNREAD_PER_CONNECTION) -> None:
        self._max_calls = max_calls
        self._numbers: Counter[str] = Counter()
        self._ends: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._ends)

    def check(self, peer: str) -> None:
        """Raise ``SlowClientError`` if a connection has too many unread responses."""
        if self._numbers[peer] >= self._max_calls:
            raise SlowClientError(f"{self._max_calls} responses of this connection are unread")

    async def end(self, context: Context, report: ErrorReport, trailers: Any = ()) -> None:
        """End a call whose last message the client has not read; its status is sent afterwards."""
        peer = context.peer()
        self._numbers[peer] += 1
        end = asyncio.create_task(_abort(context, report, trailers))
        self._ends.add(end)
        end.add_done_callback(lambda task: self._forget(task, peer))
        await asyncio.sleep(0)  # gRPC gets the status before the handler returns

    def _forget(self, end: asyncio.Task[None], peer: str) -> None:
        self._ends.discard(end)
        self._numbers[peer] -= 1
        if not self._numbers[peer]:
            del self._numbers[peer]


async def _abort(context: Context, report: ErrorReport, trailers: Any) -> None:
    try:
        await context.abort(report.grpc_code, report.message, trailers)
    except grpc.aio.BaseError as err:  # abort always raises
        err.__traceback__ = None  # see ``freed_when_aborted``


@dataclass(slots=True)
class CallLimits:
    """Limits of one gRPC port: number of calls, and times to wait for clients."""

    max_calls: int
    """Maximum number of concurrent calls, except endless streams and health checks."""
    read_limit_s: float
    """Seconds in which a client must send the message of a call."""
    write_limit_s: float
    """Seconds in which a client must read a message."""
    num_calls: int = 0
    streams: CallPool = field(default_factory=lambda: CallPool(MAX_STREAMS))
    """The running endless streams, which ``max_calls`` does not count."""
    unread: UnreadCalls = field(default_factory=UnreadCalls)

    @classmethod
    def of(cls, tuning: GatewayTuning, max_calls: int) -> CallLimits:
        """Make limits with the timeouts of the HTTP port."""
        return cls(max_calls, tuning.body_timeout_s, tuning.unread_limit_s)

    @contextlib.asynccontextmanager
    async def entered(self, peer: str, stream_s: float | None) -> AsyncIterator[None]:
        """Count a call while it runs. ``stream_s`` limits an endless stream; None for other calls.

        Raises ``QueueFullError``, ``SlowClientError``, and for a stream ``DeadlineExceededError``.
        """
        self.unread.check(peer)
        if stream_s is not None:
            async with self.streams.entered(peer, stream_s):
                yield
            return
        if self.num_calls >= self.max_calls:
            raise QueueFullError(f"{self.num_calls} calls are running, at most {self.max_calls}")
        self.num_calls += 1
        try:
            yield
        finally:
            self.num_calls -= 1


@dataclass(eq=False, slots=True)
class BoundedStream:
    """Reads and writes the messages of one call within time limits."""

    context: Context
    read_limit_s: float
    write_limit_s: float
    unread: UnreadCalls
    _is_writing: bool = False

    async def read(self) -> bytes | None:
        """Read the next message; None after the last one. Raises ``DeadlineExceededError``."""
        try:
            async with asyncio.timeout(self.read_limit_s):
                data = await self.context.read()
        except TimeoutError as err:
            raise DeadlineExceededError("the client sent no message in time") from err
        return data if isinstance(data, bytes) else None

    async def write(self, message: Any) -> None:
        """Send a message, after the initial metadata. Raises ``SlowClientError``."""
        self._is_writing = True
        try:
            async with asyncio.timeout(self.write_limit_s):
                await self.context.write(message)
        except grpc.aio.InternalError as err:  # gRPC may cancel the call a little later
            raise asyncio.CancelledError("the client has disconnected") from err
        except TimeoutError as err:
            why = f"the client has read nothing for {self.write_limit_s:g} s"
            raise SlowClientError(why) from err
        self._is_writing = False

    async def abort(
        self, error: BaseException, report: ErrorReport, trailers: tuple[tuple[str, bytes], ...]
    ) -> None:
        """End the call. Raises gRPC's error unless a message waits for the client.

        Drops the tracebacks of ``error``: their frames refer to the call and the client's message.
        """
        chained: BaseException | None = error
        while chained is not None:
            chained.__traceback__, chained = None, chained.__cause__ or chained.__context__
        if self._is_writing:
            await self.unread.end(self.context, report, trailers)
        else:
            await self.context.abort(report.grpc_code, report.message, trailers)
