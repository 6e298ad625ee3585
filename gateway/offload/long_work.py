"""A thread for work on large requests, which would block the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

INLINE_SIZE = 16_384
"""Work on at most this many bytes, characters or tokens stays on the event loop: a thread would
cost more than the work."""
_FREED_ENTRIES = 256
"""Entries of a list that are freed in one go: 20 alternatives of each take 1 ms."""
_TAKEN_ENTRIES = 65_536
"""Numbers that are converted in one go, which takes 3 ms."""
Number = TypeVar("Number", int, float)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class GcPause(contextlib.AbstractContextManager[None]):
    """Disables garbage collections, each of which would traverse all objects made so far.

    Several threads may be inside: the last one to leave enables collections again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._were_on = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._num_inside:
                self._were_on = gc.isenabled()
                gc.disable()
            self._num_inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if not self._num_inside and self._were_on:
                gc.enable()


GC_PAUSE = GcPause()
"""The instance of this process."""


class LongWork:
    """One thread that runs all work on large requests in sequence.

    More threads would gain nothing, since the work holds the interpreter lock, and would make the
    event loop wait longer for it: each of them may get the lock first.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="long-work")

    async def run(
        self,
        size: int,
        work: Callable[Arguments, Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """Return the result of ``work``; runs in the thread if ``size`` exceeds ``INLINE_SIZE``."""
        if size <= INLINE_SIZE:
            return work(*args, **kwargs)
        context = contextvars.copy_context()
        call = partial(context.run, partial(_uncollected, work, *args, **kwargs))
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def free(self, values: Sequence[list[Any]]) -> None:
        """Let the thread ``release`` lists that are no longer read, if they are long."""
        if sum(map(len, values)) > _FREED_ENTRIES:
            with contextlib.suppress(RuntimeError):  # the thread has been stopped
                self._thread.submit(free_gradually, list(values))

    def stop(self) -> None:
        """End the thread after its queued work, without waiting for it."""
        self._thread.shutdown(wait=False)


def copy_numbers(values: Sequence[Number]) -> tuple[Number, ...]:
    """Convert an array or a repeated field to a tuple of numbers, piece by piece.

    Other threads run in between: a million numbers at once take 46 ms.
    """
    found: list[Number] = []
    for start in range(0, len(values), _TAKEN_ENTRIES):
        found += values[start : start + _TAKEN_ENTRIES]
    return tuple(found)


def free_gradually(values: list[Any] | dict[str, Any]) -> None:
    """Empty a list or dict, and the ones in it, piece by piece; other threads run in between.

    Dropping the last reference to a million objects would free all of them in one go, with the
    interpreter lock held.
    """
    waiting: list[Any] = [values]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list) and len(one) > _FREED_ENTRIES:
            while one:
                del one[-_FREED_ENTRIES:]
        else:
            entries = one if isinstance(one, list) else one.values()
            waiting += [entry for entry in entries if isinstance(entry, list | dict)]
            one.clear()


def _uncollected(
    work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    with GC_PAUSE:
        return work(*args, **kwargs)
