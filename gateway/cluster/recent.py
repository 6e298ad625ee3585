"""Answers that several open pages share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


class Recent(Generic[Answer]):
    """The answer of a question, for all who ask while it is under way or young.

    Args:
        ask: asks the question.
        age_s: for how long after its question an answer is young.
        clock: in seconds.
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
        """Raises what ``ask`` raises, which is not kept."""
        now_s, asked = self._clock(), self._asked
        if asked is None or (asked.done() and not self._is_young(asked, now_s)):
            asked = self._asked = asyncio.ensure_future(self._ask())
            self._asked_s = now_s
        return await asyncio.shield(asked)  # one page that leaves ends no other's question

    def _is_young(self, asked: asyncio.Future[Answer], now_s: float) -> bool:
        failed = asked.cancelled() or asked.exception() is not None
        return not failed and now_s - self._asked_s < self._age_s
