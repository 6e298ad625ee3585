"""Runs background tasks on an actor's event loop, and lets callers wait for changes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any

logger = logging.getLogger(__name__)


class Background:
    """Runs background tasks and wakes callers that wait for changes. For one event loop only."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Start a background task. If the task fails, the error is logged."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    def notify(self) -> None:
        """Wake every caller of ``wait``, which then checks its condition again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait(self, is_true: Callable[[], bool], timeout_s: float) -> None:
        """Return once ``is_true()`` returns True, or after ``timeout_s`` seconds.

        The condition is checked at once and after every ``notify``.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not is_true():
                    await self._changed.wait()

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (err := task.exception()) is not None:
            logger.error("a task of the controller failed", exc_info=err)
