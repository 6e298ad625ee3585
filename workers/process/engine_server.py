"""The engine stream: one bidirectional gRPC stream for each gateway replica.

The server runs an asyncio loop in its own thread; the engine loop runs in another one. Commands go
to the engine loop through ``Inbox``. The engine loop calls the ``publish`` methods of
``EngineServer`` with outputs, solo steps and changes of KV blocks, and opens and closes the
streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable

import grpc
from msgspec.structs import replace

from cluster.core.errors import HandshakeError, ProtocolError
from cluster.core.release import RELEASE, check_release
from workers.kv.block_pool import HashChanges
from workers.kv.events import KvFeed
from workers.process.gateway_silence import GATEWAY_SILENCE_LIMIT_S, GatewaySilence
from workers.process.intake.commands import (
    AbortRequest,
    AddRequest,
    GatewayGone,
    Inbox,
    SoloStepNoted,
)
from workers.requests.request import Request, SoloStep, StepOutput
from workers.requests.wire import (
    ENGINE_HELLO,
    FROM_ENGINE,
    HELLO,
    MAX_MESSAGE_BYTES,
    METHOD,
    SERVICE,
    TO_ENGINE,
    Abort,
    EngineHello,
    Hello,
    KvResync,
    Ping,
    ToEngine,
)

logger = logging.getLogger(__name__)

MAX_STEPS_BEHIND = 4096
"""Step messages that may wait for one gateway; a gateway further behind loses its stream."""
HELLO_TIMEOUT_S = 5.0
"""Limit for the hello of a new stream."""
START_TIMEOUT_S = 10.0
"""Time that the server thread has to come up or to end."""
_ABORT_LIMIT_S = 1.0
"""Limit for sending a gateway that it is dropped; its connection may be blocked."""
_Context = grpc.aio.ServicerContext[bytes, bytes]


class _GatewayStream:
    def __init__(self, name: str, task: asyncio.Task[object] | None) -> None:
        self.name = name
        self.task = task
        self.queue: asyncio.Queue[bytes | None] = asyncio.Queue(MAX_STEPS_BEHIND)
        self.is_dropped = False
        self.error = ""
        """Why bytes of the gateway were no message; empty if all were."""

    def put(self, message: bytes) -> bool:
        """Queue a message; False when the gateway is too far behind."""
        try:
            self.queue.put_nowait(message)
        except asyncio.QueueFull:
            return False
        return True

    def close(self) -> None:
        """End the stream after what is queued; what does not fit any more is dropped with it."""
        while True:
            try:
                self.queue.put_nowait(None)
                return
            except asyncio.QueueFull:
                self.queue.get_nowait()


class EngineServer:
    """Serves engine streams (``workers.requests.wire``) on a free port of ``host``.

    Args:
        host: interface to bind to.
        token: cluster token that every stream must open with.
        inbox: where requests and aborts go.
        facts: returns the model's limits, for the answer to a gateway's hello.
        silence_limit_s: a gateway that has pinged and then sends nothing for this time is dropped.
        release: of this worker; gateways of another one are refused.
    """

    def __init__(
        self,
        host: str,
        token: str,
        inbox: Inbox,
        facts: Callable[[], EngineHello],
        silence_limit_s: float = GATEWAY_SILENCE_LIMIT_S,
        release: str = RELEASE,
    ) -> None:
        self._host = host
        self._token = token
        self._inbox = inbox
        self._facts = facts
        self._release = release
        self._streams: dict[str, _GatewayStream] = {}
        self._silence = GatewaySilence(silence_limit_s)
        self._kv = KvFeed()
        self._is_closed = False
        self._numbers = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._port = 0
        self._thread = threading.Thread(target=self._run, name="engine-server", daemon=True)
        self._stopping = asyncio.Event()

    def start(self) -> str:
        """Bind and serve; returns ``host:port``. Raises ``OSError`` when that fails."""
        self._thread.start()
        if not self._started.wait(START_TIMEOUT_S) or not self._port:
            raise OSError(f"the engine stream could not be served on {self._host}")
        return f"{self._host}:{self._port}"

    def publish(self, gateway: str, message: StepOutput | SoloStep) -> None:
        """Send an output or a solo step to one gateway (any thread). A closed stream is ignored."""
        self._call_soon(self._put, gateway, FROM_ENGINE.encode(message))

    def publish_kv(self, changes: HashChanges, fetch_cost: float) -> None:
        """Publish the cached blocks and the fetch cost to all gateways (any thread).

        A change of the cost alone is sent with the next blocks, and to new gateways.
        """
        if changes.stored or changes.removed:
            self._call_soon(self._tell_kv, changes, fetch_cost)
        elif fetch_cost != self._kv.fetch_cost:
            self._call_soon(self._set_fetch_cost, fetch_cost)

    def close_streams(self) -> None:
        """End every gateway's stream and refuse new ones (any thread): it may no longer serve."""
        self._call_soon(self._set_closed, True)

    def admit_streams(self) -> None:
        """Accept streams again (any thread)."""
        self._call_soon(self._set_closed, False)

    def stop(self) -> None:
        self._call_soon(self._stopping.set)
        self._thread.join(START_TIMEOUT_S)

    async def _stream(
        self, messages: AsyncIterator[bytes], context: _Context
    ) -> AsyncIterator[bytes]:
        """One gateway's stream, from its hello to its end."""
        hello = await self._authenticate(messages, context)
        if self._is_closed:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this worker may not serve now")
        name = f"{hello.gateway}#{next(self._numbers)}"
        stream = _GatewayStream(name, asyncio.current_task())
        self._streams[name] = stream
        stream.put(self._all_kv())
        reader = asyncio.create_task(self._read(messages, stream))
        try:
            yield ENGINE_HELLO.encode(replace(self._facts(), release=self._release))
            while (message := await stream.queue.get()) is not None:
                yield message
            if stream.error:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, stream.error)
        except asyncio.CancelledError:
            if stream.is_dropped:  # with a status: a cancelled handler sends none
                with contextlib.suppress(TimeoutError):
                    end = context.abort(grpc.StatusCode.UNAVAILABLE, "too long without a ping")
                    await asyncio.wait_for(end, _ABORT_LIMIT_S)
            raise
        finally:
            reader.cancel()
            self._forget(stream)

    async def _authenticate(self, messages: AsyncIterator[bytes], context: _Context) -> Hello:
        """The hello of a gateway that knows the token and is of this release; else it aborts."""
        try:
            hello = HELLO.decode(await asyncio.wait_for(anext(messages), HELLO_TIMEOUT_S))
        except (TimeoutError, StopAsyncIteration, ProtocolError):
            hello = Hello(token="", gateway="")
        if not hmac.compare_digest(hello.token.encode(), self._token.encode()):
            logger.warning("engine stream from %s refused: no valid hello", context.peer())
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a hello must come first")
        try:
            check_release(hello.release, hello.gateway, self._release, self._facts().worker)
        except HandshakeError as err:
            logger.warning("engine stream refused: %s", err)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(err))
        return hello

    async def _read(self, messages: AsyncIterator[bytes], stream: _GatewayStream) -> None:
        try:
            async for data in messages:
                self._take(TO_ENGINE.decode(data), stream)
        except ProtocolError as err:
            logger.warning("%s: %s: stream closed", stream.name, err)
            stream.error = str(err)
        finally:
            stream.close()

    def _take(self, message: ToEngine, stream: _GatewayStream) -> None:
        now = time.monotonic()
        self._silence.heard(stream.name, now, is_ping=isinstance(message, Ping))
        match message:
            case Request():
                self._inbox.put(AddRequest(stream.name, message, now))
            case Abort():
                self._inbox.put(AbortRequest(stream.name, message.request_id, message.choices))
            case SoloStep():
                self._inbox.put(SoloStepNoted(stream.name, message))
            case Ping():
                stream.put(FROM_ENGINE.encode(message))
            case KvResync():
                stream.put(self._all_kv())

    def _forget(self, stream: _GatewayStream) -> None:
        """Its requests end, once."""
        self._silence.forget(stream.name)
        if self._streams.pop(stream.name, None) is not None:
            self._inbox.put(GatewayGone(stream.name))

    async def _watch_gateways(self) -> None:
        """Drop silent gateways; a message to one could block its stream for ever."""
        looked_at = time.monotonic()
        while True:
            await asyncio.sleep(self._silence.pause_s)
            now = time.monotonic()
            for name in self._silence.look(now, looked_at):
                logger.warning("%s is silent for %g s: dropped", name, self._silence.limit_s)
                stream = self._streams[name]
                self._forget(stream)
                stream.is_dropped = True
                if stream.task is not None:
                    stream.task.cancel()
            looked_at = now

    def _put(self, gateway: str, message: bytes) -> None:
        stream = self._streams.get(gateway)
        if stream is not None and not stream.put(message):
            logger.warning("%s is %d steps behind: stream closed", gateway, MAX_STEPS_BEHIND)
            stream.close()

    def _all_kv(self) -> bytes:
        return FROM_ENGINE.encode(self._kv.whole())

    def _set_fetch_cost(self, fetch_cost: float) -> None:
        self._kv.fetch_cost = fetch_cost

    def _tell_kv(self, changes: HashChanges, fetch_cost: float) -> None:
        self._kv.fetch_cost = fetch_cost
        message = FROM_ENGINE.encode(self._kv.change(changes))
        for name in tuple(self._streams):
            self._put(name, message)

    def _set_closed(self, is_closed: bool) -> None:
        self._is_closed = is_closed
        if is_closed:
            self._close_all()

    def _close_all(self) -> None:
        for stream in self._streams.values():
            stream.close()

    def _call_soon(self, function: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function, *arguments)

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve())
        finally:
            self._started.set()

    async def _serve(self) -> None:
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
            ]
        )
        stream = grpc.stream_stream_rpc_method_handler(self._stream)  # bytes in, bytes out
        handler = grpc.method_handlers_generic_handler(SERVICE, {METHOD: stream})
        server.add_generic_rpc_handlers((handler,))
        self._port = server.add_insecure_port(f"{self._host}:0")
        await server.start()
        self._started.set()
        watcher = asyncio.create_task(self._watch_gateways())
        await self._stopping.wait()
        watcher.cancel()
        self._close_all()
        await server.stop(grace=0.5)
