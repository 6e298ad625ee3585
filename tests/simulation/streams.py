"""Stand-ins for gRPC's asyncio client and server: bidirectional streams of bytes.

A stream keeps order, has a window like HTTP/2's, and breaks with its processes or its link.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc

from tests.simulation.kernel import Kernel, Process
from tests.simulation.network import Network, Pipe, network

_END = object()


class _Inbox:
    """``asyncio.Queue`` with one reader."""

    __slots__ = ("_loop", "_messages", "_reader")

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        self._messages: deque[Any] = deque()
        self._reader: asyncio.Future[None] | None = None

    def put_nowait(self, message: Any) -> None:
        self._messages.append(message)
        if self._reader is not None:
            if not self._reader.done():
                self._reader.set_result(None)
            self._reader = None

    async def get(self) -> Any:
        while not self._messages:
            self._reader = self._loop.create_future()
            await self._reader
        return self._messages.popleft()


class Half:
    """One end's inbox, and its sending direction."""

    def __init__(self, net: Network, process: Process, loop: Any, target: str) -> None:
        self.process, self.loop = process, loop
        self.pipe = Pipe(net, process.host, target)
        self._arrived: deque[Any] = deque()
        self.inbox = _Inbox(loop)
        self.num_unread = 0
        """Messages that this end has sent and the other has not read."""
        self.may_send = asyncio.Event()
        self.may_send.set()
        self.other: Half | None = None
        self.is_over = self._is_broken = False
        self._window = net.window(process.host)

    async def send(self, message: bytes) -> None:
        if not self.may_send.is_set():
            await self.may_send.wait()
        self.num_unread += 1
        if self.num_unread >= self._window:
            self.may_send.clear()
        self.post(message)

    def resize(self, window: int) -> None:
        """Another limit of the messages on their way."""
        self._window = window
        self.loop.call_soon(self._look)

    def _look(self) -> None:
        if self.num_unread < self._window:
            self.may_send.set()

    def post(self, message: Any) -> None:
        """Send without a window: the end of a stream."""
        assert self.other is not None
        if not self._is_broken:
            self.pipe.send(self.other.arrive, message)

    def break_off(self) -> None:
        """The connection is reset: what is on its way is lost."""
        if not self._is_broken and not self.is_over:
            self._arrived.clear()
            self.arrive(_error(grpc.StatusCode.UNAVAILABLE, "Connection reset by peer"))
            self._is_broken = True

    def forget(self) -> None:
        """This end treats the connection as reset; the other end learns it when it sends."""
        self.break_off()

    def arrive(self, message: Any) -> None:
        """Something has come over the network."""
        if self._is_broken:
            assert self.other is not None
            self.pipe.send(self.other.break_off)
            return
        self._arrived.append(message)
        if not self.process.is_paused and not self.process.is_dead:
            self._take()
        else:
            self.process.run(self._take)

    def _take(self) -> None:
        """A process that was paused takes all at once, in any order of these calls."""
        if self._arrived:  # else it was reset in between
            self.loop.call_soon(self.inbox.put_nowait, self._arrived.popleft())

    async def next(self) -> Any:
        message = await self.inbox.get()
        other = self.other
        if other is not None and isinstance(message, bytes):
            other.num_unread -= 1
            if not other.may_send.is_set():
                other.loop.call_soon(other._look)
        return message


def _error(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    metadata = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, metadata, metadata, details, None)


class SimChannel:
    """``grpc.aio.insecure_channel``."""

    def __init__(self, address: str, options: Any = None) -> None:
        self._address = address

    async def __aenter__(self) -> SimChannel:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    def stream_stream(self, path: str, *codecs: Any) -> Any:
        return lambda messages: SimCall(self._address, path, messages)


class SimCall:
    """One call at its client."""

    def __init__(self, address: str, path: str, messages: AsyncIterator[bytes]) -> None:
        net, loop = network(), asyncio.get_running_loop()
        process = net.kernel.process
        assert process is not None
        self._half = Half(net, process, loop, address.rpartition(":")[0])
        self._error: BaseException | None = None
        self._half.pipe.send(self._reach, net, address, path)
        self._pump = loop.create_task(self._send(messages))
        process.on_death.append(self._died)

    async def read(self) -> Any:
        if self._error is not None:
            raise self._error
        message = await self._half.next()
        if message is _END:
            return getattr(grpc.aio, "EOF")  # noqa: B009 (its stubs lack it)
        if isinstance(message, BaseException):
            self._error = message
            raise message
        return message

    def cancel(self) -> None:
        self._pump.cancel()
        self._error = self._error or asyncio.CancelledError()
        self._half.inbox.put_nowait(self._error)
        if not self._half.is_over and self._half.other is not None:
            self._half.is_over = True
            self._half.post(_END)

    def _died(self) -> None:
        if self._half.other is not None:
            self._half.post(_error(grpc.StatusCode.CANCELLED, "the client is gone"))

    async def _send(self, messages: AsyncIterator[bytes]) -> None:
        async for message in messages:
            while self._half.other is None:
                await asyncio.sleep(0.001)
            await self._half.send(message)

    def _reach(self, net: Network, address: str, path: str) -> None:
        """The call has arrived at the address."""
        server = net.services.get(address)
        if server is None or server.process.is_dead:
            back = Pipe(net, address.rpartition(":")[0], self._half.process.host)
            back.send(self._half.arrive, _error(grpc.StatusCode.UNAVAILABLE, "refused"))
            return
        server.process.run(server.serve, self._half, path)


class SimContext:
    """``grpc.aio.ServicerContext``."""

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self.error: grpc.aio.AioRpcError | None = None

    def peer(self) -> str:
        return self._peer

    async def abort(self, code: grpc.StatusCode, details: str = "") -> None:
        self.error = _error(code, details)
        raise self.error


class SimGrpcServer:
    """``grpc.aio.server``."""

    def __init__(self, options: Any = None) -> None:
        self._net = network()
        process = self._net.kernel.process
        assert process is not None
        self.process = process
        self._loop = asyncio.get_running_loop()
        self._address = ""
        self._handlers: Any = ()
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._halves: dict[Half, None] = {}
        process.on_death.append(self._died)

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        self._handlers = handlers

    def add_insecure_port(self, address: str) -> int:
        self._address = self._net.new_address(address.rpartition(":")[0])
        return int(self._address.rpartition(":")[2])

    async def start(self) -> None:
        self._net.services[self._address] = self

    async def stop(self, grace: float | None = None) -> None:
        self._net.services.pop(self._address, None)
        for task in self._tasks:
            task.cancel()

    def serve(self, client: Half, path: str) -> None:
        """A call has arrived; runs in this process."""
        half = Half(self._net, self.process, self._loop, client.process.host)
        half.other, client.other = client, half
        self._net.calls[half] = None
        self._halves[half] = None
        self._loop.call_soon(self._begin, half, path)

    def _begin(self, half: Half, path: str) -> None:
        details = SimpleNamespace(method=path, invocation_metadata=())
        method = self._handlers[0].service(details).stream_stream
        task = self._loop.create_task(self._handle(half, method))
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))

    async def _handle(self, half: Half, method: Any) -> None:
        assert half.other is not None
        context = SimContext(half.other.process.host)
        messages = _Inbox(self._loop)
        task = asyncio.current_task()
        assert task is not None

        async def receive() -> None:
            while isinstance(message := await half.next(), bytes):
                messages.put_nowait(message)
            messages.put_nowait(_END)
            task.cancel()  # the client has cancelled its call, or is gone

        receiver = self._loop.create_task(receive())
        answers = method(_all_of(messages), context)
        end: Any = _END
        try:
            async for message in answers:
                await half.send(message)
        except grpc.aio.AioRpcError as err:
            end = err
        except asyncio.CancelledError:
            end = context.error or _error(grpc.StatusCode.CANCELLED, "cancelled")
        receiver.cancel()
        half.is_over = True
        self._halves.pop(half, None)
        self._net.calls.pop(half, None)
        half.post(end)
        await answers.aclose()

    def _died(self) -> None:
        self._net.services.pop(self._address, None)
        for half in self._halves:
            half.post(_error(grpc.StatusCode.UNAVAILABLE, "Socket closed"))


async def _all_of(messages: _Inbox) -> AsyncIterator[bytes]:
    while isinstance(message := await messages.get(), bytes):
        yield message


class SimRunner:
    """``asyncio.Runner`` in a thread."""

    def __init__(self, *, loop_factory: Any) -> None:
        self._loop = loop_factory()

    def __enter__(self) -> SimRunner:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def run(self, work: Any) -> None:
        """Park the calling thread until the work has ended."""
        kernel = Kernel.current
        assert kernel is not None
        fiber = kernel.this_fiber()
        task: list[asyncio.Task[Any]] = []
        is_done = False

        def end(_: object) -> None:
            nonlocal is_done
            is_done = True
            fiber.wake()

        def begin() -> None:
            task.append(self._loop.create_task(work))
            task[0].add_done_callback(end)

        self._loop.call_soon(begin)
        while not is_done:
            fiber.park()
