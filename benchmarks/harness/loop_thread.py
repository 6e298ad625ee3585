"""An event loop in a thread of its own, which ends with nothing left in it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import wait
from typing import Any, TypeVar

Result = TypeVar("Result")


class LoopThread:
    """Runs from its making until ``close``."""

    def __init__(self, limit_s: float) -> None:
        """``limit_s`` is the longest wait for a coroutine, and for the end."""
        self._limit_s = limit_s
        self._stop = asyncio.Event()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Result], limit_s: float | None = None) -> Result:
        """Run a coroutine, from another thread; a time-out shows what all tasks do."""
        limit_s = self._limit_s if limit_s is None else limit_s
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        if not wait([future], limit_s).done:
            raise TimeoutError("\n".join(map(repr, asyncio.all_tasks(self.loop))))
        return future.result()

    def call(self, function: Callable[[], object]) -> None:
        """Run a function, from another thread, to its end."""

        async def work() -> None:
            function()

        self.run(work())

    def close(self) -> None:
        """Cancel what is still under way, wait for its end, close the loop."""
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(self._limit_s)
        assert not self._thread.is_alive(), "the event loop does not end"

    def _main(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._wait())

    async def _wait(self) -> None:
        await self._stop.wait()
