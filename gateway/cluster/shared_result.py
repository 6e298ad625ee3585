"""Cache of one result for concurrent callers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")


class SharedResult(Generic[Result]):
    """Result of an asynchronous call, shared by all callers while it is pending or fresh.

    Args:
        make: makes the call.
        age_s: seconds after the start of the call for which its result is fresh.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        make: Callable[[], Awaitable[Result]],
        age_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make, self._age_s, self._clock = make, age_s, clock
        self._started_s = 0.0
        self._pending: asyncio.Future[Result] | None = None

    async def get(self) -> Result:
        """Return the fresh or pending result, or call ``make``. Raises the exceptions of ``make``,
        which are not cached.
        """
        now_s, pending = self._clock(), self._pending
        if pending is None or (pending.done() and not self._is_fresh(pending, now_s)):
            pending = self._pending = asyncio.ensure_future(self._make())
            self._started_s = now_s
        return await asyncio.shield(pending)  # a cancelled caller must not cancel the others

    def _is_fresh(self, pending: asyncio.Future[Result], now_s: float) -> bool:
        failed = pending.cancelled() or pending.exception() is not None
        return not failed and now_s - self._started_s < self._age_s
