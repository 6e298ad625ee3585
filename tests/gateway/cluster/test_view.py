"""Which snapshots of the controller a gateway believes."""

from __future__ import annotations

import asyncio
from typing import Any

from gateway.cluster.view import ClusterView, ControllerCalls


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
