"""The engine stream: one bidirectional gRPC stream for each gateway replica.

The server runs an asyncio loop in its own thread. Commands go to the engine's thread through
``Inbox``. The engine's thread calls the ``publish`` methods of ``EngineServer`` with outputs, solo
steps and changes of KV blocks, and opens and closes the streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TypeAlias

import grpc
import psutil

from cluster.core.addresses import tune_socket
from cluster.core.errors import HandshakeError, ProtocolError
from cluster.core.grpc_poller import keep_grpc_poller
from cluster.core.release import RELEASE
from workers.kv.block_pool import HashChanges
from workers.kv.events import KvFeed
from workers.process.gateway_streams import (
    GATEWAY_SILENCE_LIMIT_S,
    GatewayStream,
    GatewayStreams,
)
from workers.process.intake.commands import Inbox
from workers.requests.block_hash import BlockHash, block_hashes, sequence_hashes
from workers.requests.request import Queued, Request, SoloStep, StepOutput
from workers.requests.stream_handshake import WorkerHandshake
from workers.requests.wire import (
    FROM_ENGINE,
    MAX_MESSAGE_BYTES,
    METHOD,
    SERVICE,
    TO_ENGINE,
    EngineHello,
    KvPressure,
    KvResync,
    Paused,
    Prefetch,
    Prefetched,
    ToEngine,
)

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 5.0
"""Time limit for each message of the handshake."""
HANDSHAKE_LIMIT_S = 10.0
"""Time limit for the whole handshake, and for gRPC's own handshake."""
MAX_HANDSHAKES = 256
"""Maximum number of unfinished handshakes; one more ends the oldest, so that callers without the
cluster token keep no gateway out."""
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    ("grpc.server_handshake_timeout_ms", int(1000 * HANDSHAKE_LIMIT_S)),
    ("grpc.http2.settings_timeout", int(1000 * HANDSHAKE_LIMIT_S)),
    ("grpc.max_connection_idle_ms", 75_000),
    ("grpc.max_allowed_incoming_connections", 1024),
    ("grpc.max_concurrent_streams", 64),
)
"""gRPC options: message sizes, and limits for connections that open no stream."""
START_TIMEOUT_S = 10.0
"""Time limit for the start and the end of the server thread."""
_FREE_CHANGE = 0.25
"""Relative change of the number of free blocks above which it is published at once."""
_ABORT_LIMIT_S = 1.0
"""Time limit for the last message to a dropped gateway, whose connection may be blocked."""
_KEPT_HASHES = 64
GatewayMessage: TypeAlias = StepOutput | SoloStep | Queued | Prefetched | Paused | KvPressure
"""Messages about requests, sent to the gateway that owns them."""
_MAY_NOT_SERVE = "this worker may not serve now"
_Context = grpc.aio.ServicerContext[bytes, bytes]


class EngineServer:
    """Serves engine streams (``workers.requests.wire``) on a free port of ``host``.

    Args:
        host: interface to bind to.
        token: cluster token that both sides prove.
        inbox: receives the commands of gateways.
        facts: returns the model's limits, for the reply to a gateway's hello.
        silence_limit_s: seconds without a message after which a gateway that pings is dropped.
        release: release of this worker; gateways of another release are refused.
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
        self._facts = facts
        self._release = release
        self._streams = GatewayStreams(inbox, silence_limit_s)
        self._handshakes: dict[asyncio.Task[object], float] = {}
        self._kv = KvFeed()
        self._prompt_hashes: dict[str, tuple[BlockHash, ...]] = {}
        """Hashes of the blocks of the latest prompts that were prefetched, by request id."""
        self._admitted = 0
        self._fence = -1
        self._loop = asyncio.new_event_loop()
        self._calls: deque[Callable[[], object]] = deque()
        self._is_held = False
        self._started = threading.Event()
        self._port = 0
        self._thread = threading.Thread(target=self._run, name="engine-server", daemon=True)
        self._stopping = asyncio.Event()

    def start(self) -> str:
        """Bind and serve; returns ``host:port``. Raises ``OSError`` if that fails."""
        self._thread.start()
        if not self._started.wait(START_TIMEOUT_S) or not self._port:
            raise OSError(f"the engine stream could not be served on {self._host}")
        return f"{self._host}:{self._port}"

    def hold(self) -> None:
        """Hold back published messages, in order, until ``release`` is called.

        The engine's thread calls it after a step. Otherwise the server's thread would compete with
        it for the interpreter lock until the next step computes outside the lock.
        """
        self._is_held = True

    def release(self) -> None:
        """Send the held messages, and later ones as they are published (any thread)."""
        self._is_held = False
        if self._calls:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._run_calls)

    def publish(self, gateway: str, message: GatewayMessage) -> None:
        """Send a message to one gateway (any thread); ignored if its stream is closed.

        The server's thread encodes it.
        """
        self._publish(self._streams.send, gateway, message)

    def publish_kv(self, changes: HashChanges, fetch_cost: float, num_free: int) -> None:
        """Send changed cached blocks, the fetch cost and the number of free blocks to all gateways.

        If no cached block has changed, nothing is sent until one changes, or until the number of
        free blocks has changed by a quarter. Any thread.
        """
        known = self._kv.num_free
        has_changed = abs(num_free - known) > _FREE_CHANGE * max(num_free, known)
        if changes.stored or changes.removed or has_changed or fetch_cost != self._kv.fetch_cost:
            self._publish(self._send_kv, changes, fetch_cost, num_free, has_changed)

    def close_streams(self, fence: int) -> None:
        """End all streams, unless a generation above ``fence`` was admitted (any thread).

        New streams are refused until ``admit_streams`` is called for such a generation.
        """
        self._call_soon(self._raise_fence, fence)

    def admit_streams(self, generation: int) -> None:
        """Accept streams if this generation is above the fence (any thread)."""
        self._call_soon(self._admit, generation)

    def stop(self) -> None:
        self._call_soon(self._stopping.set)
        self._thread.join(START_TIMEOUT_S)

    async def _stream(
        self, messages: AsyncIterator[bytes], context: _Context
    ) -> AsyncIterator[bytes]:
        """Serve one gateway's stream, from its hello to its end."""
        task = asyncio.current_task()
        assert task is not None, "gRPC runs every handler in a task"
        if len(self._handshakes) >= MAX_HANDSHAKES:
            self._end_handshake(next(iter(self._handshakes)))
        handshake = WorkerHandshake(self._token, self._facts().worker, self._release)
        self._handshakes[task] = time.monotonic()
        try:
            yield handshake.challenge(await _receive_handshake(messages))
            hello = handshake.finish(await _receive_handshake(messages), self._facts())
        except HandshakeError as err:
            logger.warning("engine stream from %s refused: %s", context.peer(), err)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(err))
        finally:
            self._handshakes.pop(task, None)
        if self._admitted <= self._fence:
            await context.abort(grpc.StatusCode.ABORTED, _MAY_NOT_SERVE)
        stream = self._streams.open(handshake.gateway, task.cancel)
        self._put_all_kv(stream.name)
        reader = asyncio.create_task(self._read(messages, stream))
        try:
            yield hello
            while (message := await stream.next()) is not None:
                yield message
            if stream.error:
                await context.abort(grpc.StatusCode.ABORTED, stream.error)
        except asyncio.CancelledError:
            if stream.error:  # dropped; a cancelled handler would send no status
                with contextlib.suppress(TimeoutError):
                    end = context.abort(grpc.StatusCode.ABORTED, stream.error)
                    await asyncio.wait_for(end, _ABORT_LIMIT_S)
            raise
        finally:
            reader.cancel()
            self._streams.forget(stream)

    async def _read(self, messages: AsyncIterator[bytes], stream: GatewayStream) -> None:
        error = ""
        try:
            async for data in messages:
                message = TO_ENGINE.decode(data)
                if isinstance(message, KvResync):
                    self._put_all_kv(stream.name)
                else:
                    self._streams.handle_message(
                        message, stream, time.monotonic(), self._hashes(message)
                    )
        except ProtocolError as err:
            logger.warning("%s: %s: stream closed", stream.name, err)
            error = str(err)
        finally:
            stream.close(error)

    def _hashes(self, message: ToEngine) -> tuple[tuple[BlockHash, ...], ...]:
        """Compute block hashes for ``GatewayStreams.handle_message`` on the server's thread."""
        facts = self._facts()
        size, limit = facts.kv_block_size, facts.kv_length_matters_above
        match message:
            case Request() as request if size and len(request.prompt) <= facts.max_model_len:
                return (tuple(block_hashes(request, size, limit)),)
            case Prefetch(request=request) if size and not request.output_so_far:
                # Each step of a long prompt causes a prefetch.
                known = self._prompt_hashes.pop(request.request_id, None)
                found = tuple(block_hashes(request, size, limit)) if known is None else known
                self._prompt_hashes[request.request_id] = found
                if len(self._prompt_hashes) > _KEPT_HASHES:
                    del self._prompt_hashes[next(iter(self._prompt_hashes))]
                return (found,)
            case Prefetch(request=request) if size:
                choices = set(range(request.n)) - set(request.closed_choices)
                return tuple(sequence_hashes(request, c, size, limit) for c in sorted(choices))
        return ()

    async def _watch_gateways(self) -> None:
        checked_at = time.monotonic()
        while True:
            await asyncio.sleep(self._streams.check_interval_s)
            now = time.monotonic()
            self._streams.drop_silent(now, checked_at)
            self._end_handshakes(now)
            checked_at = now

    def _end_handshakes(self, now: float) -> None:
        """Cancel handshakes that exceed their limit because the caller does not read."""
        for task, since in list(self._handshakes.items()):
            if now - since > HANDSHAKE_LIMIT_S:
                self._end_handshake(task)

    def _end_handshake(self, task: asyncio.Task[object]) -> None:
        del self._handshakes[task]
        task.cancel()

    def _put_all_kv(self, name: str) -> None:
        for events in self._kv.whole():
            self._streams.put(name, FROM_ENGINE.encode(events))

    def _send_kv(
        self, changes: HashChanges, fetch_cost: float, num_free: int, has_changed: bool
    ) -> None:
        self._kv.fetch_cost = fetch_cost
        if changes.stored or changes.removed or has_changed:
            self._kv.num_free = num_free
            self._streams.put_all(FROM_ENGINE.encode(self._kv.change(changes)))

    def _admit(self, generation: int) -> None:
        self._admitted = max(self._admitted, generation)

    def _raise_fence(self, fence: int) -> None:
        self._fence = max(self._fence, fence)
        if self._admitted <= self._fence:
            self._streams.close_all(_MAY_NOT_SERVE)

    def _publish(self, function: Callable[..., object], *arguments: object) -> None:
        self._calls.append(partial(function, *arguments))
        if not self._is_held:
            self.release()

    def _call_soon(self, function: Callable[..., object], *arguments: object) -> None:
        self._calls.append(partial(function, *arguments))
        self.release()

    def _run_calls(self) -> None:
        try:
            while self._calls:
                self._calls.popleft()()
        finally:
            if self._calls:  # one call has failed; the others still run
                self._loop.call_soon(self._run_calls)

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve())
        finally:
            self._started.set()

    async def _serve(self) -> None:
        keep_grpc_poller()
        server = grpc.aio.server(options=_OPTIONS)
        stream = grpc.stream_stream_rpc_method_handler(self._stream)  # bytes in, bytes out
        handler = grpc.method_handlers_generic_handler(SERVICE, {METHOD: stream})
        server.add_generic_rpc_handlers((handler,))
        self._port = server.add_insecure_port(f"{self._host}:0")
        _tune_listener(self._port)
        await server.start()
        self._started.set()
        watcher = asyncio.create_task(self._watch_gateways())
        await self._stopping.wait()
        watcher.cancel()
        self._streams.close_all()
        await server.stop(grace=0.5)


def _tune_listener(port: int) -> None:
    """Tune the listener's socket; sockets that gRPC accepts inherit the options."""
    with contextlib.suppress(OSError, psutil.Error):
        for each in psutil.Process().net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr.port == port:
                with socket.socket(fileno=os.dup(each.fd)) as listener:
                    tune_socket(listener)


async def _receive_handshake(messages: AsyncIterator[bytes]) -> bytes:
    """Receive the next message of a handshake."""
    try:
        return await asyncio.wait_for(anext(messages), HELLO_TIMEOUT_S)
    except (TimeoutError, StopAsyncIteration) as err:
        raise HandshakeError("the first message must be a hello") from err
