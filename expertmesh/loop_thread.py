"""An event loop in its own thread, for synchronous callers of coroutines."""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from collections.abc import AsyncGenerator, Coroutine, Iterator
from concurrent.futures import CancelledError, wait
from typing import Any, TypeVar

from expertmesh.errors import APIConnectionError

Result = TypeVar("Result")


class LoopThread:
    """Runs an event loop from its construction until ``close``.

    Args:
        limit_s: longest time in seconds to wait for a coroutine, and for the loop to end.
    """

    def __init__(self, limit_s: float = threading.TIMEOUT_MAX) -> None:
        self._limit_s = limit_s
        self._stop = asyncio.Event()
        self._lock = threading.RLock()
        self._is_closing = False
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Result], limit_s: float | None = None) -> Result:
        """Run a coroutine and return its result. ``limit_s`` defaults to the constructor's.

        Raises ``TimeoutError``, which lists all tasks, or ``APIConnectionError`` after ``close``.
        """
        limit_s = self._limit_s if limit_s is None else limit_s
        with self._lock:  # ``close`` does not wait for a coroutine that starts later
            if self._is_closing:
                work.close()
                raise APIConnectionError("the client is closed")
            future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            if not wait([future], limit_s).done:
                raise TimeoutError("\n".join(map(repr, asyncio.all_tasks(self.loop))))
        except BaseException:
            future.cancel()
            raise
        try:
            return future.result()
        except CancelledError:
            raise APIConnectionError("the client was closed during the call") from None

    def iterate(self, source: AsyncGenerator[Result]) -> Iterator[Result]:
        """Iterate over an asynchronous generator from another thread; close it at the end."""

        async def next_item() -> list[Result]:
            async for item in source:
                return [item]
            return []

        try:
            while found := self.run(next_item()):
                yield found[0]
        finally:  # do not wait: the garbage collector may run this on the loop's own thread
            if not self.loop.is_closed():
                asyncio.run_coroutine_threadsafe(source.aclose(), self.loop)

    def close(self) -> None:
        """Cancel all tasks, wait until they have ended, and close the loop.

        Raises ``TimeoutError``, which lists all tasks and the stacks of all threads.
        """
        with self._lock:
            self._is_closing = True
            self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(self._limit_s)
        if self._thread.is_alive():
            frames = sys._current_frames().values()
            stacks = ["".join(traceback.format_stack(frame)) for frame in frames]
            tasks = map(repr, asyncio.all_tasks(self.loop))
            raise TimeoutError("\n".join(["the event loop did not end", *tasks, *stacks]))

    def _main(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._stop.wait())
