"""Threads for calls that wait for a disk.

A disk that hangs blocks only these threads; asyncio's own threads stay free for other work. The
threads are daemon threads, so that the process can end while a call hangs.
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
"""Time in seconds that running disk calls get to finish when their gateway ends."""
_IDLE_S = 5.0
"""Time in seconds without a call after which a thread for disk calls ends."""


async def run_to_completion(work: Awaitable[Result]) -> Result:
    """Await ``work`` and return its result. If the caller is cancelled, the cancellation takes
    effect only after ``work`` has ended."""
    future = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # mark as retrieved: the caller gets the cancellation
        raise


class DiskThreads:
    """A bounded number of threads for the calls of one disk, used by one event loop.

    Args:
        what: subject of error messages, such as "the state folder".
        max_threads: maximum number of running calls.
        max_waiting: maximum number of calls that wait for a thread.
        limit_s: time limit of a call, including its wait.
        error: makes the exception of a timed-out call from a message.
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
        self._late: list[_Job] = []  # running jobs that have timed out

    async def run(
        self,
        call: Callable[..., Result],
        *args: Any,
        release: Callable[[Result], object] | None = None,
    ) -> Result:
        """Run a call in a thread and return its result.

        Raises the call's exception; raises ``error`` after a timeout, if timed-out calls block all
        threads, or if too many calls wait. A running call cannot be stopped and may still take
        effect. If the caller no longer waits when the result arrives, one of the threads passes the
        result to ``release``.
        """
        self._check_capacity()
        job = _Job(partial(call, *args))
        future = self._start(job)
        is_taken = False
        try:
            await asyncio.wait({future}, timeout=self._limit_s)
            is_taken = future.done()
        finally:
            if not is_taken:
                future.cancel()  # a call that waits for a thread must not start
                self._late.append(job)
                if release is not None and job.has_result(release):
                    self._executor.submit(release, job.result)
        if not is_taken:
            message = f"{self._what} has not answered for {self._limit_s:g} s"
            logger.error(message)
            raise self._error(message)
        found: Result = future.result()
        return found

    def run_later(self, call: Callable[[], object]) -> None:
        """Run a call in one of the disk threads; return at once, without waiting for the call."""
        self._executor.submit(call)

    async def run_to_completion(self, call: Callable[..., Result], *args: Any) -> Result:
        """Run a call in a disk thread without a time limit and return its result. If the caller is
        cancelled, the cancellation takes effect only after the call has ended."""
        return await run_to_completion(self._start(_Job(partial(call, *args))))

    def _start(self, job: _Job) -> asyncio.Future[Any]:
        context = contextvars.copy_context()
        return asyncio.get_running_loop().run_in_executor(self._executor, context.run, job.run)

    def _check_capacity(self) -> None:
        self._late = [job for job in self._late if job.is_running]
        if len(self._late) >= self._max_threads:
            raise self._error(
                f"{self._what} does not answer: {len(self._late)} calls have waited for more than "
                f"{self._limit_s:g} s"
            )
        if self._executor.num_calls >= self._max_threads + self._max_waiting:
            raise self._error(f"{self._what} is too slow: {self._max_waiting} calls wait for it")


class _Job:
    """A call for a disk thread, and its state, which the thread that runs the call changes."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._changed = Lock()
        self._release: Callable[[Any], object] | None = None
        self.is_running = False
        self.result: Any = None
        """Result of the call; None until the call has returned."""

    def run(self) -> Any:
        self.is_running = True
        try:
            found = self._call()
            with self._changed:
                self.result, release = found, self._release
            if release is not None:
                release(found)
            return found
        finally:
            self.is_running = False

    def has_result(self, release: Callable[[Any], object]) -> bool:
        """Whether the call's result has arrived; if not, ``release`` will be called with it
        later."""
        with self._changed:
            self._release = release
            return self.result is not None


class _DaemonExecutor(Executor):
    """Executor that starts threads on demand and ends idle ones.

    Unlike ``ThreadPoolExecutor`` it does not join its threads when the process ends.
    """

    def __init__(self, name: str, max_threads: int) -> None:
        self._name = name
        self._max_threads = max_threads
        self._changed = Condition()
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._num_threads = self._num_idle = 0
        self.num_calls = 0
        """Number of calls that run or wait, including calls that were cancelled while waiting."""

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
        while (taken := self._next_call()) is not None:
            self._run(*taken)
            del taken  # release the call and its result while the thread waits
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

    def _next_call(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        """Wait for the next call; return None after ``_IDLE_S`` without a call, so that the thread
        ends."""
        with self._changed:
            self._num_idle += 1
            has_work = self._changed.wait_for(lambda: bool(self._waiting), _IDLE_S)
            self._num_idle -= 1
            if has_work:
                return self._waiting.popleft()
            self._num_threads -= 1
            return None
