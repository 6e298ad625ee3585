"""Which snapshots of the controller a gateway believes."""

from __future__ import annotations

import asyncio
from typing import Any

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
        view = ClusterView(find, _controller=Answers(newer, older, restarted, newer))
        assert await view.fresh() == newer
        assert await view.fresh() == newer
        assert await view.fresh() == restarted
        assert await view.fresh() == restarted

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

        view = ClusterView(find, "gateway-7")
        view.start()
        await is_asked.wait()
        assert asked == [("wait_snapshot", (-1, POLL_TIMEOUT_S, "gateway-7"))]
        await view.leave()
        assert asked[1:] == [("gateway_leaves", ("gateway-7",))]

    asyncio.run(body())
