"""Which snapshots of the controller a gateway believes."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from gateway.cluster import view
from gateway.cluster.view import POLL_TIMEOUT_S, ClusterView, ControllerCalls


class Answers:
    """A controller with prepared answers."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self._answers = list(answers)

    async def ask(self, call: str, *details: Any) -> Any:
        return self._answers.pop(0)


def test_an_answer_that_a_newer_one_has_overtaken_is_dropped() -> None:
    async def body() -> None:
        async def find() -> ControllerCalls:
            raise AssertionError("the controller is known")

        newer, older = {"term": 1, "version": 8}, {"term": 1, "version": 7}
        restarted = {"term": 2, "version": 9}
        found = ClusterView(find, _controller=Answers(newer, older, restarted, newer))
        assert await found.fresh() == newer
        assert await found.fresh() == newer
        assert await found.fresh() == restarted
        assert await found.fresh() == restarted

    asyncio.run(body())


def test_a_search_that_ray_does_not_answer_is_the_only_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each holds a thread of those that also tokenize long prompts."""
    monkeypatch.setattr(view, "CALL_TIMEOUT_S", 0.01)
    monkeypatch.setattr(view, "_RETRY_S", 0.0)
    caplog.set_level(logging.DEBUG, view.__name__)

    async def body() -> None:
        num_searches, answers = 0, asyncio.Event()

        async def find() -> ControllerCalls:
            nonlocal num_searches
            num_searches += 1
            await answers.wait()
            return Answers({"term": 1, "version": 7})

        found = ClusterView(find)
        found.start()
        while len(caplog.records) < 3:
            await asyncio.sleep(0)
        assert num_searches == 1
        answers.set()
        while found.snapshot is None:
            await asyncio.sleep(0)
        found.stop()

    asyncio.run(body())


def test_it_asks_under_its_name_and_says_when_it_leaves() -> None:
    async def body() -> None:
        asked: list[tuple[str, tuple[Any, ...]]] = []
        is_asked = asyncio.Event()

        class Controller:
            async def ask(self, call: str, *details: Any) -> Any:
                asked.append((call, details))
                is_asked.set()
                if call == "wait_snapshot":
                    await asyncio.Event().wait()

        async def find() -> ControllerCalls:
            return Controller()

        found = ClusterView(find, "gateway-7")
        found.start()
        await is_asked.wait()
        assert asked == [("wait_snapshot", (-1, POLL_TIMEOUT_S, "gateway-7"))]
        await found.leave()
        assert asked[1:] == [("gateway_leaves", ("gateway-7",))]

    asyncio.run(body())
