"""Work that is done aside: what takes long is computed by an executor, its result taken at a tick.

The controller's loop must answer heartbeats within milliseconds; planning a large model takes
longer. Work must be a pure function of values that nobody changes meanwhile. Whoever takes the
result looks first whether it is still wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class AtOnce(Executor):
    """Does the work where it is asked for: the result is there when ``submit`` returns."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """See ``Executor``."""
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as err:  # it belongs to whoever asks for the result
            future.set_exception(err)
        return future


@dataclass(eq=False, slots=True)
class Task:
    """One piece of work."""

    future: Future[Any]
    """Its result."""
    then: Callable[[Future[Any], float], None]
    """What follows, with the time at which it does."""


class Aside:
    """The work that is under way. All calls are made by one thread; ``now`` is in seconds."""

    def __init__(self, executor: Executor | None = None) -> None:
        """None: everything is done at once."""
        self._executor = executor or AtOnce()
        self._tasks: list[Task] = []

    def begin(
        self, work: Callable[[], T], then: Callable[[Future[T], float], None], now: float
    ) -> Task:
        """Begin with it; ``then`` follows at a tick, or before this returns."""
        task = Task(self._executor.submit(work), then)
        self._tasks.append(task)
        self.tick(now)
        return task

    def tick(self, now: float) -> None:
        """Go on with what has been computed."""
        for task in [t for t in self._tasks if t.future.done()]:
            if task in self._tasks:  # nothing before it has dropped it
                self._tasks.remove(task)
                task.then(task.future, now)

    def waits(self, task: Task) -> bool:
        """What follows it is still to come."""
        return task in self._tasks

    def drop(self, task: Task) -> None:
        """Nobody wants the result any more; what has begun runs to its end unheard."""
        if task in self._tasks:
            self._tasks.remove(task)
            task.future.cancel()
