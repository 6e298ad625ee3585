"""Which snapshots of the controller a gateway believes."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from cluster.core.errors import NotReadyError
from cluster.core.frames import LowDisk
from cluster.core.release import RELEASE
from gateway.cluster import view
from gateway.cluster.view import POLL_TIMEOUT_S, ControllerCalls, SnapshotFollower


class Answers:
    """A controller with prepared answers; it repeats the last one."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self._answers = list(answers)

    async def call(self, call: str, *details: Any) -> Any:
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


def test_an_answer_that_a_newer_one_has_overtaken_is_dropped() -> None:
    async def body() -> None:
        async def find() -> ControllerCalls:
            raise AssertionError("the controller is known")

        newer, older = ({"term": 1, "version": v, "release": RELEASE} for v in (8, 7))
        restarted = {"term": 2, "version": 9, "release": RELEASE}
        found = SnapshotFollower(find, _controller=Answers(newer, older, restarted, newer))
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
            return Answers({"term": 1, "version": 7, "release": RELEASE})

        found = SnapshotFollower(find)
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
            async def call(self, call: str, *details: Any) -> Any:
                asked.append((call, details))
                is_asked.set()
                if call == "wait_snapshot":
                    await asyncio.Event().wait()

        async def find() -> ControllerCalls:
            return Controller()

        low = (LowDisk(folder="/logs", free_bytes=1),)
        found = SnapshotFollower(find, "gateway-7", host="10.0.0.9", low_disks=lambda: low)
        found.adapters = lambda: ("sql@1",)
        found.start()
        await is_asked.wait()
        details = (-1, POLL_TIMEOUT_S, "gateway-7", "10.0.0.9", low, ("sql@1",))
        assert asked == [("wait_snapshot", details)]
        await found.leave()
        assert asked[1:] == [("gateway_leaves", ("gateway-7",))]

    asyncio.run(body())


@pytest.mark.parametrize(("theirs", "known"), [("9.9.9", "release 9.9.9"), ("", "no release")])
def test_a_controller_of_another_release_is_refused_by_name_and_once(
    theirs: str, known: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(view, "_RETRY_S", 0.0)

    async def body() -> None:
        num_searches = 0
        ours, other = ({"term": 1, "version": 7, "release": r} for r in ("1.1.1", theirs))

        async def find() -> ControllerCalls:
            nonlocal num_searches
            num_searches += 1
            return Answers(ours if num_searches > 3 else other)

        found = SnapshotFollower(find, "gateway-7", "1.1.1")
        found.start()
        while num_searches < 3:
            await asyncio.sleep(0)
        refusal = f"{known} of the controller, 1.1.1 of gateway-7: releases must be equal"
        assert (found.snapshot, found.refusal) == (None, refusal)
        while found.snapshot is None:
            await asyncio.sleep(0)
        assert (found.snapshot, found.refusal) == (ours, "")
        assert [r.getMessage() for r in caplog.records] == [
            f"the controller's snapshots are rejected: {refusal}"
        ]
        found.stop()

    asyncio.run(body())


def test_no_order_is_given_to_a_controller_of_another_release() -> None:
    async def body() -> None:
        async def find() -> ControllerCalls:
            raise AssertionError("it does not follow")

        other = {"term": 1, "version": 7, "release": "9.9.9"}
        found = SnapshotFollower(find, "gateway-7", "1.1.1", _controller=Answers(other))
        assert await found.fresh() is None
        with pytest.raises(NotReadyError, match=r"release 9\.9\.9 of the controller, 1\.1\.1 of"):
            await found.call("begin", "rebalance", {})

    asyncio.run(body())
