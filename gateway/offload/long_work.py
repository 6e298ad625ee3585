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
"""Number of bytes, characters or tokens up to which work runs on the event loop, as a thread would
cost more than the work."""
_FREED_ENTRIES = 256
"""Number of list entries freed at a time, in 1 ms if each is a token with 20 alternatives."""
_TAKEN_ENTRIES = 65_536
"""How many numbers of a list are converted at a time, in 3 ms."""
Number = TypeVar("Number", int, float)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class GcPause(contextlib.AbstractContextManager[None]):
    """Disables garbage collections, which would traverse all objects made so far.

    Several threads may use it at the same time. The last one to exit enables collections again.
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
"""The ``GcPause`` of this process."""


class LongWork:
    """One thread that runs all work on large requests, one after another.

    More threads would not be faster, since the work holds the GIL, and the event loop would wait
    longer for the GIL.
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
        """Return the result of ``work``, run in the thread if ``size`` exceeds ``INLINE_SIZE``."""
        if size <= INLINE_SIZE:
            return work(*args, **kwargs)
        context = contextvars.copy_context()
        call = partial(context.run, partial(_uncollected, work, *args, **kwargs))
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def free(self, values: Sequence[list[Any]]) -> None:
        """Free lists that are no longer used, long ones gradually in the thread."""
        if sum(map(len, values)) > _FREED_ENTRIES:
            with contextlib.suppress(RuntimeError):  # the thread was stopped
                self._thread.submit(free_gradually, list(values))

    def stop(self) -> None:
        """End the thread after its queued work, without waiting."""
        self._thread.shutdown(wait=False)


def copy_numbers(values: Sequence[Number]) -> tuple[Number, ...]:
    """Convert an array or a repeated field to a tuple of numbers, in pieces.

    Other threads can run in between. A million numbers in one piece would take 46 ms.
    """
    found: list[Number] = []
    for start in range(0, len(values), _TAKEN_ENTRIES):
        found += values[start : start + _TAKEN_ENTRIES]
    return tuple(found)


def free_gradually(values: list[Any] | dict[str, Any]) -> None:
    """Empty a list or dict and the lists and dicts in it, in pieces; other threads run in between.

    Dropping the last reference to a million objects would free them all while holding the GIL.
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
