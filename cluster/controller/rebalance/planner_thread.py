"""Overlapped computation: an executor plans, and the controller takes the result at a tick.

The controller's loop must answer heartbeats within milliseconds; planning a large model takes
longer. A computation must be a pure function of immutable values. Its consumer checks whether the
result is still wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

T = TypeVar("T")


class Computations:
    """The computations under way. One thread calls; ``now`` is in seconds."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._pending: dict[Future[Any], Callable[[Future[Any], float], None]] = {}

    def begin(
        self, work: Callable[[], T], then: Callable[[Future[T], float], None], now: float
    ) -> Future[T]:
        """Begin a computation; ``then`` gets its result at a tick, or before this returns."""
        future = self._executor.submit(work)
        self._pending[future] = then
        self.tick(now)
        return future

    def tick(self, now: float) -> None:
        """Call the continuations of finished computations."""
        for future in [f for f in self._pending if f.done()]:
            then = self._pending.pop(future, None)
            if then is not None:  # no earlier continuation has dropped it
                then(future, now)

    def waits(self, future: Future[Any]) -> bool:
        """A continuation is still to come."""
        return future in self._pending

    def drop(self, future: Future[Any]) -> None:
        """Drop the result; a computation that has begun still runs to its end."""
        if self._pending.pop(future, None) is not None:
            future.cancel()
