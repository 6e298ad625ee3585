"""Answers that several pages share, by a clock moved by hand."""

from __future__ import annotations

import asyncio

import pytest

from gateway.cluster.shared_result import SharedResult


class Question:
    """Counts how often it is asked; waits until it may be answered."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.now_s = 100.0
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.error: Exception | None = None
        self.recent = SharedResult(self._ask, 1.0, lambda: self.now_s)

    async def _ask(self) -> int:
        self.num_asked += 1
        number = self.num_asked
        await self.may_answer.wait()
        if self.error is not None:
            raise self.error
        return number


def test_a_young_answer_is_shared() -> None:
    async def run() -> None:
        question = Question()
        assert await question.recent.get() == 1
        question.now_s += 0.9
        assert await question.recent.get() == 1
        question.now_s += 0.1
        assert await question.recent.get() == 2

    asyncio.run(run())


def test_all_who_wait_get_the_same_answer_and_one_may_leave() -> None:
    async def run() -> None:
        question = Question()
        question.may_answer.clear()
        waiting = [asyncio.ensure_future(question.recent.get()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        question.now_s += 50
        late = asyncio.ensure_future(question.recent.get())
        await asyncio.sleep(0)
        question.may_answer.set()
        assert [await one for one in (*waiting[1:], late)] == [1, 1, 1]
        assert waiting[0].cancelled()

    asyncio.run(run())


def test_an_error_is_not_kept() -> None:
    async def run() -> None:
        question = Question()
        question.error = ValueError("no answer")
        with pytest.raises(ValueError, match="no answer"):
            await question.recent.get()
        question.error = None
        assert await question.recent.get() == 2

    asyncio.run(run())
