"""Threads for calls that wait for a disk.

A disk that hangs holds these threads and no others: asyncio's own threads are for work that ends.
The threads are daemons, so that a call that never ends does not keep the process from ending.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future
from functools import partial
from threading import Condition, Lock, Thread
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

END_S = 5.0
"""Time for calls of a disk to end when their gateway ends."""
_IDLE_S = 5.0
"""Time after which a thread without work ends."""


async def to_its_end(work: Awaitable[Result]) -> Result:
    """The result of work that continues when this is cancelled: it is waited for even then."""
    future = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # seen: the cancellation is what the caller learns
        raise


class DiskThreads:
    """A bounded number of threads for the calls of one disk. One event loop may use it.

    Args:
        what: the subject of its errors: "the state folder".
        max_threads: calls that run at a time.
        max_waiting: calls that may wait for a thread.
        limit_s: longest time of a call, from when it is asked for.
        error: what is raised for calls whose time is over, with a message.
    """

    def __init__(
        self,
        what: str,
        max_threads: int,
        max_waiting: int,
        limit_s: float,
        error: Callable[[str], Exception] = TimeoutError,
    ) -> None:
        self._what = what
        self._max_threads = max_threads
        self._max_waiting = max_waiting
        self._limit_s = limit_s
        self._error = error
        self._executor = _DaemonExecutor(what, max_threads)
        self._late: list[_Job] = []  # that ran when their time was over

    async def run(
        self,
        call: Callable[..., Result],
        *args: Any,
        release: Callable[[Result], object] | None = None,
    ) -> Result:
        """The result of a call. Raises what it raises, and ``error`` when its time is over, when
        every thread has a call whose time is over, or when too many calls wait.

        A call that runs cannot be stopped: it may still have its effect. ``release`` closes, in one
        of the threads, a result that comes when its caller has gone.
        """
        self._check_room()
        job = _Job(partial(call, *args))
        future = self._start(job)
        is_taken = False
        try:
            await asyncio.wait({future}, timeout=self._limit_s)
            is_taken = future.done()
        finally:
            if not is_taken:
                future.cancel()  # a call that waits for a thread does not begin
                self._late.append(job)
                if release is not None and job.has_found(release):
                    self._executor.submit(release, job.found)
        if not is_taken:
            message = f"{self._what} has not answered for {self._limit_s:g} s"
            logger.error(message)
            raise self._error(message)
        found: Result = future.result()
        return found

    def run_later(self, call: Callable[[], object]) -> None:
        """Make a call in one of the threads, without waiting for its end."""
        self._executor.submit(call)

    async def run_to_end(self, call: Callable[..., Result], *args: Any) -> Result:
        """The result of a call that has no limit of time; it ends before a cancellation does."""
        return await to_its_end(self._start(_Job(partial(call, *args))))

    def _start(self, job: _Job) -> asyncio.Future[Any]:
        context = contextvars.copy_context()
        return asyncio.get_running_loop().run_in_executor(self._executor, context.run, job.run)

    def _check_room(self) -> None:
        self._late = [job for job in self._late if job.is_running]
        if len(self._late) >= self._max_threads:
            raise self._error(
                f"{self._what} does not answer: {len(self._late)} calls have waited for more than "
                f"{self._limit_s:g} s"
            )
        if self._executor.num_calls >= self._max_threads + self._max_waiting:
            raise self._error(f"{self._what} is too slow: {self._max_waiting} calls wait for it")


class _Job:
    """A call and its state; its thread changes the state."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._changed = Lock()
        self._release: Callable[[Any], object] | None = None
        self.is_running = False
        self.found: Any = None
        """The result, once there is one."""

    def run(self) -> Any:
        self.is_running = True
        try:
            found = self._call()
            with self._changed:
                self.found, release = found, self._release
            if release is not None:
                release(found)
            return found
        finally:
            self.is_running = False

    def has_found(self, release: Callable[[Any], object]) -> bool:
        """Whether there is a result already; else it is released when it comes."""
        with self._changed:
            self._release = release
            return self.found is not None


class _DaemonExecutor(Executor):
    """Starts threads as they are needed; they end when there is no work.

    ``ThreadPoolExecutor`` joins its threads at the end of the process.
    """

    def __init__(self, name: str, max_threads: int) -> None:
        self._name = name
        self._max_threads = max_threads
        self._changed = Condition()
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._num_threads = self._num_idle = 0
        self.num_calls = 0
        """Calls that run or wait, also those that were cancelled while they waited."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = Future[Any]()
        with self._changed:
            self._waiting.append((future, partial(fn, *args, **kwargs)))
            self.num_calls += 1
            if self._num_idle < len(self._waiting) and self._num_threads < self._max_threads:
                Thread(target=self._work, name=self._name, daemon=True).start()
                self._num_threads += 1
            self._changed.notify()
        return future

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            self._run(*taken)
            del taken  # nothing is kept while the thread waits
            with self._changed:
                self.num_calls -= 1

    @staticmethod
    def _run(future: Future[Any], call: Callable[[], Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            found = call()
        except BaseException as err:
            future.set_exception(err)
        else:
            future.set_result(found)

    def _take(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        """The next call; None where none has come for ``_IDLE_S``: the thread ends."""
        with self._changed:
            self._num_idle += 1
            has_work = self._changed.wait_for(lambda: bool(self._waiting), _IDLE_S)
            self._num_idle -= 1
            if has_work:
                return self._waiting.popleft()
            self._num_threads -= 1
            return None
