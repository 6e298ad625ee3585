"""The gRPC stream from a gateway to one attention worker: handshake, messages, pings and end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass

import grpc

from cluster.core.errors import ProtocolError
from cluster.core.grpc_poller import keep_grpc_poller
from cluster.core.release import RELEASE
from gateway.cluster.view import AttentionEndpoint
from workers.requests.stream_handshake import GatewayHandshake
from workers.requests.wire import (
    FROM_ENGINE,
    MAX_MESSAGE_BYTES,
    PATH,
    TO_ENGINE,
    EngineHello,
    FromEngine,
    Ping,
    ToEngine,
)

PING_S = 1.0
"""Interval in seconds between two pings of a gateway to a worker."""
_CHECKS_PER_PING = 4
"""Checks of a worker's silence in the time between two pings."""
SILENCE_LIMIT_S = 5.0
"""Seconds without a message or ping reply from a worker after which its stream is ended."""
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)
_Call = grpc.aio.StreamStreamCall[bytes, bytes]


_LIVE_END_CODES = frozenset(
    {
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNAUTHENTICATED,
    }
)
"""gRPC status codes with which a living worker ends a stream, as it cannot serve or drops this
gateway."""


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """Reason why a stream to a worker ended."""

    reason: str
    has_died: bool
    """Whether the worker probably died."""


class EngineStream:
    """One gRPC stream to an attention worker, which ends if the worker is silent for too long.

    Args:
        endpoint: the worker.
        token: the cluster token.
        gateway: name of this gateway replica.
        silence_limit_s: seconds without a message from the worker after which the stream ends.
        ping_s: interval in seconds between two pings.
        release: expertmesh version of this replica. A worker of another version is refused.
    """

    def __init__(
        self,
        endpoint: AttentionEndpoint,
        *,
        token: str,
        gateway: str,
        silence_limit_s: float = SILENCE_LIMIT_S,
        ping_s: float = PING_S,
        release: str = RELEASE,
    ) -> None:
        self.endpoint = endpoint
        self.hello: EngineHello | None = None
        """Facts about the worker from the handshake; None before it and after the stream's end."""
        self.connected = asyncio.Event()
        """Event that is set when the handshake with the worker has succeeded."""
        self._handshake = GatewayHandshake(token, gateway, release)
        self._proof: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._silence_limit_s = silence_limit_s
        self._ping_s = ping_s
        self._outgoing: asyncio.Queue[ToEngine | None] = asyncio.Queue()
        self._heard_s = time.monotonic()
        self._is_silent = False

    def send(self, message: ToEngine) -> None:
        """Queue a message for the worker, without waiting."""
        self._outgoing.put_nowait(message)

    async def run(self, take: Callable[[FromEngine], Awaitable[None]]) -> StreamEnd:
        """Pass each message of the worker to ``take`` until the stream ends; return why it ended.

        Cancelling this call ends the stream.
        """
        end = await self._run(take)
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # gRPC loses it if the call ends now
            raise asyncio.CancelledError
        return end

    async def _run(self, take: Callable[[FromEngine], Awaitable[None]]) -> StreamEnd:
        self._heard_s = time.monotonic()
        keep_grpc_poller()
        async with grpc.aio.insecure_channel(
            self.endpoint.address, options=_CHANNEL_OPTIONS
        ) as channel:
            call = channel.stream_stream(PATH, bytes, bytes)(self.messages())
            pinger = asyncio.create_task(self._ping(call))
            try:
                await self._read(call, take)
                return StreamEnd("the worker closed the stream", has_died=True)
            except grpc.aio.AioRpcError as err:
                reason = f"{err.code().name}: {err.details()}"
                return StreamEnd(reason, has_died=err.code() not in _LIVE_END_CODES)
            except ProtocolError as err:
                return StreamEnd(str(err), has_died=False)
            except asyncio.CancelledError:
                if self._is_silent:  # read() reports our own call.cancel() in this way
                    reason = f"no sign of life for {self._silence_limit_s} s"
                    return StreamEnd(reason, has_died=True)
                raise
            finally:
                self.hello = None
                pinger.cancel()
                call.cancel()
                self._proof.put_nowait(None)  # ends the gRPC task that waits for messages
                self._outgoing.put_nowait(None)

    async def _read(self, call: _Call, take: Callable[[FromEngine], Awaitable[None]]) -> None:
        if isinstance(data := await call.read(), bytes):
            self.take_challenge(data)
        if isinstance(data := await call.read(), bytes):
            self.hello = self._handshake.finish(data)
            self.connected.set()
        while isinstance(data := await call.read(), bytes):
            self._heard_s = time.monotonic()
            await take(FROM_ENGINE.decode(data))

    def take_challenge(self, challenge: bytes) -> None:
        """Queue the proof that this gateway knows the cluster token, as the reply to a worker.

        ``challenge`` is the worker's first message. Raises ``HandshakeError`` if it is invalid or
        of another release.
        """
        self._proof.put_nowait(self._handshake.prove(challenge))

    async def messages(self) -> AsyncGenerator[bytes]:
        """Yield the encoded messages for the worker: the handshake, then the queued messages."""
        yield self._handshake.start()
        if (proof := await self._proof.get()) is not None:
            yield proof
        while (message := await self._outgoing.get()) is not None:
            yield TO_ENGINE.encode(message)

    async def _ping(self, call: _Call) -> None:
        check_s = self._ping_s / _CHECKS_PER_PING
        number, now_s = 0, time.monotonic()
        ping_at_s = now_s + self._ping_s
        while True:
            due_s = now_s + check_s
            await asyncio.sleep(check_s)
            now_s = time.monotonic()
            # while this process is late, messages may be unread
            self._heard_s = min(now_s, self._heard_s + now_s - due_s)
            if now_s - self._heard_s > self._silence_limit_s:
                self._is_silent = True
                call.cancel()
                return
            if now_s >= ping_at_s:
                number += 1
                self.send(Ping(number=number))
                ping_at_s = now_s + self._ping_s
