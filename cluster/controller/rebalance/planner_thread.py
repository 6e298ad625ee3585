"""Overlapped computation: an executor plans, and the controller takes the result at a tick.

The controller's loop must answer heartbeats within milliseconds; planning a large model takes
longer. A computation must be a pure function of immutable values. Its consumer checks whether the
result is still wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class AtOnce(Executor):
    """Computes in the caller: the result is there when ``submit`` returns."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as err:  # the caller raises it when it takes the result
            future.set_exception(err)
        return future


class Computations:
    """The computations under way. One thread calls; ``now`` is in seconds."""

    def __init__(self, executor: Executor | None = None) -> None:
        """None computes in the caller."""
        self._executor = executor or AtOnce()
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
