"""What is done with large requests leaves the event loop, one at a time."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading

import pytest

from gateway.offload import long_work
from gateway.offload.long_work import INLINE_SIZE, LongWork, copy_numbers, free_gradually


def where() -> str:
    return threading.current_thread().name


def test_only_large_work_leaves_the_loop() -> None:
    async def run() -> tuple[str, str]:
        work = LongWork()
        found = await work.run(INLINE_SIZE, where), await work.run(INLINE_SIZE + 1, where)
        work.stop()
        return found

    here, there = asyncio.run(run())
    assert here == threading.current_thread().name
    assert there.startswith("long-work")


def test_work_runs_one_at_a_time_and_without_collections() -> None:
    running, most, collected = 0, 0, []

    def busy() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        collected.append(gc.isenabled())
        running -= 1

    async def run() -> None:
        work = LongWork()
        await asyncio.gather(*(work.run(INLINE_SIZE + 1, busy) for _ in range(20)))
        work.stop()

    asyncio.run(run())
    assert (most, collected, gc.isenabled()) == (1, [False] * 20, True)


def test_work_sees_the_context_of_its_request_and_its_error_comes_back() -> None:
    caller = contextvars.ContextVar("caller", default="")

    def fail() -> None:
        raise ValueError(caller.get())

    async def run() -> None:
        work = LongWork()
        caller.set("a client")
        try:
            await work.run(INLINE_SIZE + 1, fail)
        finally:
            work.stop()

    with pytest.raises(ValueError, match="a client"):
        asyncio.run(run())


def test_long_lists_are_freed_piece_by_piece_in_the_thread() -> None:
    freed: list[tuple[str, int]] = []

    class Entry:
        def __del__(self) -> None:
            freed.append((where(), len(lists[0])))

    lists = [[Entry() for _ in range(1000)], [Entry()]]

    async def run() -> None:
        work = LongWork()
        work.free(lists)
        await work.run(INLINE_SIZE + 1, where)  # the thread does one after the other
        work.stop()

    asyncio.run(run())
    assert all(thread.startswith("long-work") for thread, _ in freed)
    lengths = [length for _, length in freed]
    assert len(lengths) == 1001
    assert len(set(lengths)) >= 4
    assert lists == [[], []]


def test_what_is_inside_is_freed_too() -> None:
    inner, table = [1] * 1000, {"a": [2] * 1000}
    body = {"choices": [inner, {"logprobs": table}]}
    free_gradually(body)
    assert (body, inner, table) == ({}, [], {})


def test_numbers_are_taken_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Field(list[int]):
        def __getitem__(self, which: slice) -> list[int]:  # type: ignore[override]
            found = super().__getitem__(which)
            sizes.append(len(found))
            return found

    monkeypatch.setattr(long_work, "_TAKEN_ENTRIES", 10)
    assert copy_numbers(Field(range(25))) == tuple(range(25))
    assert sizes == [10, 10, 5]
