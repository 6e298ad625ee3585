"""An asyncio event loop of a simulated process, and what asyncio's servers need of it."""

from __future__ import annotations

import asyncio
import contextvars
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from tests.simulation.kernel import Fiber, Kernel
from tests.simulation.sockets import SimSocket

if TYPE_CHECKING:
    from tests.simulation.kernel import Process


_MAX_CALLBACKS = 100
"""Callbacks that run before other threads and processes get a turn."""
_AnyLoop: Any = asyncio.AbstractEventLoop  # most of its methods are for no code here


class SimHandle:
    """``asyncio.Handle`` and ``TimerHandle``: a callback that can be cancelled."""

    __slots__ = ("args", "callback", "context", "is_cancelled", "loop", "time")

    def __init__(
        self,
        loop: SimLoop,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: contextvars.Context | None,
        time: float = 0.0,
    ) -> None:
        self.loop, self.callback, self.args, self.context = loop, callback, args, context
        self.time = time
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    def cancelled(self) -> bool:
        return self.is_cancelled

    def when(self) -> float:
        return self.time

    def run(self) -> None:
        try:
            if self.context is None:
                self.callback(*self.args)
            else:
                self.context.run(self.callback, *self.args)
        except Exception as err:
            self.loop.call_exception_handler({"exception": err})

    def expire(self) -> None:
        """The time has come."""
        if not self.is_cancelled:
            self.loop.add(self)


class SimLoop(_AnyLoop):  # type: ignore[misc]
    """Runs callbacks in the order in which they were scheduled, in virtual time."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._kernel = process.kernel
        self._ready: deque[SimHandle] = deque()
        self._is_scheduled = False
        self._is_held = self._has_missed = False
        process.loops.append(self)

    def hold(self) -> None:
        """Its thread stands still."""
        self._kernel.log("an event loop of %s stands still", self._process.name)
        self._is_held = True

    def release(self) -> None:
        """It goes on."""
        self._is_held = False
        if self._has_missed:
            self._has_missed = False
            self._schedule()

    def call_soon(
        self,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> SimHandle:
        handle = SimHandle(self, callback, args, context)
        self._ready.append(handle)
        if not self._is_scheduled:
            self._schedule()
        return handle

    call_soon_threadsafe = call_soon

    def call_later(
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> SimHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> SimHandle:
        handle = SimHandle(self, callback, args, context, when)
        at = when - self._process.clock_offset_s
        self._kernel.at(max(at, self._kernel.now), self._process.run, handle.expire)
        return handle

    def add(self, handle: SimHandle) -> None:
        """Run it when the loop has the processor."""
        self._ready.append(handle)
        if not self._is_scheduled:
            self._schedule()

    def time(self) -> float:
        return self._kernel.now + self._process.clock_offset_s

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self,
        coro: Coroutine[Any, Any, Any],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[Any]:
        return asyncio.Task(coro, loop=self, name=name, context=context)

    def run_in_executor(
        self, executor: object, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        future = self.create_future()

        def work() -> None:
            try:
                result, error = func(*args), None
            except Exception as err:
                result, error = None, err
            self.call_soon(self._settle, future, result, error)

        Fiber(self._process, work, "executor").start()
        return future

    get_debug = staticmethod(bool)  # always False; each future and each task asks

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return self._process.is_dead

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if self._kernel.is_over or self._process.is_dead:
            return
        error = context.get("exception")
        what = f"{type(error).__name__}: {error}" if error else context.get("message")
        self._kernel.failures.append(f"event loop of {self._process.name}: {what}")

    @staticmethod
    def _settle(future: asyncio.Future[Any], result: object, error: Exception | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    def _schedule(self) -> None:
        self._is_scheduled = True
        kernel = self._kernel
        kernel.after(kernel.switch_delay_s(), self._turn)

    def _turn(self) -> None:
        """Run what is ready, as far as a turn goes."""
        process, kernel = self._process, self._kernel
        if process.is_dead:
            return
        if process.is_paused:
            process.run(self._turn)
            return
        if self._is_held:
            self._has_missed = True
            return
        before, kernel.process = kernel.process, process
        ready = self._ready
        events._set_running_loop(self)
        try:
            for _ in range(_MAX_CALLBACKS):
                if not ready or process.is_dead:
                    break
                handle = ready.popleft()
                if not handle.is_cancelled:
                    handle.run()
        finally:
            events._set_running_loop(None)
            kernel.process = before
        if ready:
            self._schedule()
        else:
            self._is_scheduled = False


class SimWriter:
    """``asyncio.StreamWriter`` and its transport."""

    def __init__(self, sock: SimSocket) -> None:
        self._sock = sock
        self._unsent = bytearray()
        self._is_closing = False
        self.transport = self

    def write(self, data: bytes) -> None:
        if not self._is_closing:
            self._unsent += data
            self.flush()

    def flush(self) -> None:
        """Send what the socket takes."""
        try:
            while self._unsent:
                del self._unsent[: self._sock.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError:
            self._unsent.clear()
        if self._is_closing and not self._unsent:
            self._sock.close()

    def get_write_buffer_size(self) -> int:
        return len(self._unsent)

    def is_closing(self) -> bool:
        return self._is_closing

    def close(self) -> None:
        self._is_closing = True
        self.flush()

    def abort(self) -> None:
        self._is_closing = True
        self._unsent.clear()
        self._sock.close()

    def get_extra_info(self, name: str) -> Any:
        return self._sock if name == "socket" else (self._sock.host, 0)


class SimServer:
    """``asyncio.Server``: each connection gets a task."""

    def __init__(self, handler: Any, sock: SimSocket) -> None:
        self.sockets = [sock]
        self._handler = handler
        self._tasks: dict[asyncio.Task[None], None] = {}
        sock.setblocking(False)
        sock.on_change = self._accept
        self._is_closed = False

    def is_serving(self) -> bool:
        return not self._is_closed

    def close(self) -> None:
        self._is_closed = True
        self.sockets[0].close()

    def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while self.sockets[0].accepted:
            sock, _ = self.sockets[0].accept()
            sock.setblocking(False)
            reader, writer = asyncio.StreamReader(loop=loop), SimWriter(sock)
            reader_end = _ReaderEnd(sock, reader, writer)
            sock.on_change = reader_end.pump
            reader_end.pump()
            task = loop.create_task(self._handler(reader, writer))
            self._tasks[task] = None
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]


class _ReaderEnd:
    """Moves bytes from a socket to its reader."""

    def __init__(self, sock: SimSocket, reader: asyncio.StreamReader, writer: SimWriter) -> None:
        self._sock, self._reader, self._writer = sock, reader, writer
        self._is_over = False

    def pump(self) -> None:
        self._writer.flush()
        while not self._is_over:
            try:
                data = self._sock.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError as err:
                self._is_over = True
                if self._writer.is_closing():
                    self._reader.feed_eof()
                else:
                    self._reader.set_exception(err)
                return
            if data:
                self._reader.feed_data(data)
            else:
                self._is_over = True
                self._reader.feed_eof()


async def start_server(handler: Any, host: str, port: int) -> SimServer:
    """``asyncio.start_server``."""
    sock = SimSocket()
    sock.listen_at(host)
    return SimServer(handler, sock)


def new_event_loop() -> SimLoop:
    """``asyncio.new_event_loop``: another loop of the same process."""
    kernel = Kernel.current
    assert kernel is not None
    assert kernel.process is not None, "loops belong to processes"
    return SimLoop(kernel.process)
