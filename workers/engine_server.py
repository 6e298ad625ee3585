"""The engine stream: one bidirectional gRPC stream for each gateway replica.

The server runs an asyncio loop in a thread of its own; the engine loop runs in another. They meet
in two places only: ``Inbox`` (requests and aborts on their way in) and ``EngineServer.publish``
(one message per step and gateway on its way out).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass

import grpc

from protos import engine_pb2 as pb
from protos import engine_pb2_grpc
from workers.gateway_silence import GATEWAY_SILENCE_LIMIT_S, GatewaySilence
from workers.inspection import BankShape
from workers.kv_blocks import HashChanges
from workers.kv_feed import KvFeed
from workers.request import Request, StepOutput, Turn
from workers.wire import (
    kv_events_to_wire,
    request_from_wire,
    step_to_wire,
    turn_from_wire,
    turn_to_wire,
)

logger = logging.getLogger(__name__)

MAX_STEPS_BEHIND = 4096
"""Step messages that may wait for one gateway; a gateway further behind loses its stream."""
HELLO_TIMEOUT_S = 5.0
"""Time that a new stream has to say who it is."""
START_TIMEOUT_S = 10.0
"""Time that the server thread has to come up or to end."""
_ABORT_LIMIT_S = 1.0
"""Time to tell a gateway that it is dropped; its connection may take nothing any more."""
_MAX_MESSAGE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class AddRequest:
    """A gateway hands a request over."""

    gateway: str
    request: Request
    received: float
    """Monotonic seconds at which the stream delivered it."""


@dataclass(frozen=True, slots=True)
class AbortRequest:
    """A gateway no longer wants a request, or some of its choices (none named: all)."""

    gateway: str
    request_id: str
    choices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GatewayGone:
    """A gateway's stream ended: nobody waits for its requests any more."""

    gateway: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFacts:
    """What a gateway must know of the engine before it can validate a request."""

    worker: str
    """Name of the attention worker."""
    generation: int
    """Generation it follows."""
    max_model_len: int
    """Context limit in tokens; 0 while the weights load."""
    vocab_size: int
    """Token ids are below it."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end an output."""
    max_kv_tokens: int
    """Tokens that the whole KV pool holds; 0 while the weights load."""
    dtype: str
    """Compute type."""
    model_type: str
    """Family."""
    hidden_size: int
    """Width of the residual stream."""
    num_layers: int
    """Layers."""
    num_heads: int
    """Query heads."""
    labels: tuple[str, ...]
    """Classes of a sequence classifier."""
    pad_token_id: int | None
    """Token that a classifier does not take for the last one."""
    problem_type: str
    """Of a classifier; empty where the checkpoint says nothing."""
    banks: tuple[BankShape, ...]
    """Routers."""
    kv_block_size: int
    """Tokens of a KV block; 0: requests share none."""
    kv_length_matters_above: int | None
    """See ``ModelConfig.length_matters_above``."""


@dataclass(frozen=True, slots=True)
class TurnNoted:
    """A gateway has noted whose turn it is to run alone."""

    gateway: str
    turn: Turn


Command = AddRequest | AbortRequest | GatewayGone | TurnNoted


class Inbox:
    """Commands from the streams to the engine loop; ``wake`` is called after each."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._commands: deque[Command] = deque()
        self._wake = wake

    def put(self, command: Command) -> None:
        """Add a command (any thread)."""
        self._commands.append(command)
        self._wake()

    def take(self) -> list[Command]:
        """All commands that wait now (engine loop only)."""
        taken = []
        with contextlib.suppress(IndexError):
            while True:
                taken.append(self._commands.popleft())
        return taken


class _GatewayStream:
    """What is on its way to one gateway."""

    def __init__(self, name: str, task: asyncio.Task[object] | None) -> None:
        self.name = name
        self.task = task
        self.queue: asyncio.Queue[pb.FromEngine | None] = asyncio.Queue(MAX_STEPS_BEHIND)
        self.is_dropped = False

    def put(self, message: pb.FromEngine) -> bool:
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


class EngineServer(engine_pb2_grpc.EngineServicer):
    """Serves ``expertmesh.v1.Engine`` on a free port of ``host``.

    Args:
        host: interface to bind to.
        token: cluster token that every stream must open with.
        inbox: where requests and aborts go.
        facts: tells the model's limits, for the answer to a gateway's hello.
        silence_limit_s: a gateway that pings, and then says nothing for so long, is dropped.
    """

    def __init__(
        self,
        host: str,
        token: str,
        inbox: Inbox,
        facts: Callable[[], EngineFacts],
        silence_limit_s: float = GATEWAY_SILENCE_LIMIT_S,
    ) -> None:
        self._host = host
        self._token = token
        self._inbox = inbox
        self._facts = facts
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

    def publish(self, gateway: str, step: StepOutput) -> None:
        """Send a step's news to one gateway (any thread). A gateway that is gone is ignored."""
        message = pb.FromEngine(step=step_to_wire(step))
        self._call_soon(self._put, gateway, message)

    def publish_turn(self, gateway: str, turn: Turn) -> None:
        """Tell a gateway that its request runs alone, or has done so (any thread)."""
        self._call_soon(self._put, gateway, pb.FromEngine(turn=turn_to_wire(turn)))

    def publish_kv(self, changes: HashChanges, fetch_cost: float) -> None:
        """Tell all gateways which blocks can be found here (any thread), and what fetching costs.

        The cost alone is no news: it is told with the next blocks, and to gateways that come.
        """
        if changes.stored or changes.removed:
            self._call_soon(self._tell_kv, changes, fetch_cost)
        elif fetch_cost != self._kv.fetch_cost:
            self._call_soon(self._set_fetch_cost, fetch_cost)

    def close_streams(self) -> None:
        """End every gateway's stream and refuse new ones (any thread): it may no longer serve."""
        self._call_soon(self._set_closed, True)

    def admit_streams(self) -> None:
        """Gateways may come again (any thread)."""
        self._call_soon(self._set_closed, False)

    def stop(self) -> None:
        """End the server and its thread."""
        self._call_soon(self._stopping.set)
        self._thread.join(START_TIMEOUT_S)

    async def Stream(
        self,
        request_iterator: AsyncIterator[pb.ToEngine],
        context: grpc.aio.ServicerContext[pb.ToEngine, pb.FromEngine],
    ) -> AsyncIterator[pb.FromEngine]:
        """One gateway's stream, from its hello to its end."""
        hello = await self._authenticate(request_iterator, context)
        if self._is_closed:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this worker may not serve now")
        name = f"{hello.gateway}#{next(self._numbers)}"
        stream = _GatewayStream(name, asyncio.current_task())
        self._streams[name] = stream
        stream.put(self._all_kv())
        reader = asyncio.create_task(self._read(request_iterator, stream))
        try:
            yield pb.FromEngine(hello=pb.EngineHello(**asdict(self._facts())))
            while (message := await stream.queue.get()) is not None:
                yield message
        except asyncio.CancelledError:
            if stream.is_dropped:  # say so: to be cancelled here tells the other side nothing
                with contextlib.suppress(TimeoutError):
                    end = context.abort(grpc.StatusCode.UNAVAILABLE, "too long without a ping")
                    await asyncio.wait_for(end, _ABORT_LIMIT_S)
            raise
        finally:
            reader.cancel()
            self._forget(stream)

    async def _authenticate(
        self,
        messages: AsyncIterator[pb.ToEngine],
        context: grpc.aio.ServicerContext[pb.ToEngine, pb.FromEngine],
    ) -> pb.Hello:
        try:
            first = await asyncio.wait_for(anext(messages), HELLO_TIMEOUT_S)
        except (TimeoutError, StopAsyncIteration):
            first = pb.ToEngine()
        if not hmac.compare_digest(first.hello.token.encode(), self._token.encode()):
            logger.warning("engine stream from %s refused: no valid hello", context.peer())
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a hello must come first")
        return first.hello

    async def _read(self, messages: AsyncIterator[pb.ToEngine], stream: _GatewayStream) -> None:
        try:
            async for message in messages:
                self._take(message, stream)
        finally:
            stream.close()

    def _take(self, message: pb.ToEngine, stream: _GatewayStream) -> None:
        kind = message.WhichOneof("message")
        self._silence.heard(stream.name, time.monotonic(), is_ping=kind == "ping")
        if kind == "request":
            request = request_from_wire(message.request)
            self._inbox.put(AddRequest(stream.name, request, time.monotonic()))
        elif kind == "abort":
            abort = message.abort
            self._inbox.put(AbortRequest(stream.name, abort.request_id, tuple(abort.choices)))
        elif kind == "turn":
            self._inbox.put(TurnNoted(stream.name, turn_from_wire(message.turn)))
        elif kind == "ping":
            stream.put(pb.FromEngine(pong=message.ping))
        elif kind == "kv_resync":
            stream.put(self._all_kv())

    def _forget(self, stream: _GatewayStream) -> None:
        """Its requests end, once."""
        self._silence.forget(stream.name)
        if self._streams.pop(stream.name, None) is not None:
            self._inbox.put(GatewayGone(stream.name))

    async def _watch_gateways(self) -> None:
        """Drop those that fall silent. What is on its way to one may block its stream for ever."""
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

    def _put(self, gateway: str, message: pb.FromEngine) -> None:
        stream = self._streams.get(gateway)
        if stream is not None and not stream.put(message):
            logger.warning("%s is %d steps behind: stream closed", gateway, MAX_STEPS_BEHIND)
            stream.close()

    def _all_kv(self) -> pb.FromEngine:
        return pb.FromEngine(kv=kv_events_to_wire(self._kv.whole()))

    def _set_fetch_cost(self, fetch_cost: float) -> None:
        self._kv.fetch_cost = fetch_cost

    def _tell_kv(self, changes: HashChanges, fetch_cost: float) -> None:
        self._kv.fetch_cost = fetch_cost
        message = pb.FromEngine(kv=kv_events_to_wire(self._kv.change(changes)))
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
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
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
                ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
            ]
        )
        engine_pb2_grpc.add_EngineServicer_to_server(self, server)
        self._port = server.add_insecure_port(f"{self._host}:0")
        await server.start()
        self._started.set()
        watcher = asyncio.create_task(self._watch_gateways())
        await self._stopping.wait()
        watcher.cancel()
        self._close_all()
        await server.stop(grace=0.5)
