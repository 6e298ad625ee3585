"""Cache of one result that several open pages share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


class Recent(Generic[Answer]):
    """Result of an asynchronous call, shared by all callers while it is pending or fresh.

    Args:
        ask: makes the call.
        age_s: seconds from the call for which its result is fresh.
        clock: time in seconds.
    """

    def __init__(
        self,
        ask: Callable[[], Awaitable[Answer]],
        age_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask, self._age_s, self._clock = ask, age_s, clock
        self._asked_s = 0.0
        self._asked: asyncio.Future[Answer] | None = None

    async def get(self) -> Answer:
        """Return the result. Raises the exception of ``ask``, which is not cached."""
        now_s, asked = self._clock(), self._asked
        if asked is None or (asked.done() and not self._is_young(asked, now_s)):
            asked = self._asked = asyncio.ensure_future(self._ask())
            self._asked_s = now_s
        return await asyncio.shield(asked)  # a cancelled caller must not cancel the others

    def _is_young(self, asked: asyncio.Future[Answer], now_s: float) -> bool:
        failed = asked.cancelled() or asked.exception() is not None
        return not failed and now_s - self._asked_s < self._age_s
