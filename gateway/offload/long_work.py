"""Work on large requests, which leaves the event loop."""

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
"""Work on at most this many bytes, characters or tokens stays on the event loop: a thread costs
more than that work."""
_FREED_ENTRIES = 256
"""Entries of a list that are freed in one go: 20 alternatives each take 1 ms."""
_TAKEN_ENTRIES = 65_536
"""Numbers that are made in one go, which takes 3 ms."""
Number = TypeVar("Number", int, float)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class NoCollections(contextlib.AbstractContextManager[None]):
    """No garbage collections, each of which would go through all that was made so far.

    Several threads may be inside: the last one to leave turns collections on again.
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


NO_COLLECTIONS = NoCollections()
"""Of the process."""


class LongWork:
    """One thread for all that is done with large requests, one after the other.

    More threads would gain nothing, since the work holds the interpreter lock. They would make the
    event loop wait for the lock longer: each of them may hold it first.
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
        """The result of ``work``; it runs in the thread if ``size`` is above ``INLINE_SIZE``."""
        if size <= INLINE_SIZE:
            return work(*args, **kwargs)
        context = contextvars.copy_context()
        call = partial(context.run, partial(_uncollected, work, *args, **kwargs))
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def free(self, values: Sequence[list[Any]]) -> None:
        """Have the thread ``release`` lists that are not read any more, if they are long."""
        if sum(map(len, values)) > _FREED_ENTRIES:
            with contextlib.suppress(RuntimeError):  # it has been stopped
                self._thread.submit(release, list(values))

    def stop(self) -> None:
        """End the thread when its work is done; never waits."""
        self._thread.shutdown(wait=False)


def numbers_of(values: Sequence[Number]) -> tuple[Number, ...]:
    """The numbers in an array or a repeated field, taken piece by piece.

    Other threads run in between: a million numbers at once take 46 ms.
    """
    found: list[Number] = []
    for start in range(0, len(values), _TAKEN_ENTRIES):
        found += values[start : start + _TAKEN_ENTRIES]
    return tuple(found)


def release(values: list[Any] | dict[str, Any]) -> None:
    """Empty a list or dict, and those in it, piece by piece: other threads run in between.

    The last reference to a million objects would free all of them in one go, with the interpreter
    lock held.
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
    with NO_COLLECTIONS:
        return work(*args, **kwargs)
