"""How a replica follows the table of models, and what it reports meanwhile."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from cluster.core.codec import to_plain
from cluster.core.errors import ConflictError, NotReadyError
from cluster.core.model_table import ModelTable
from gateway.cluster import table_follower
from gateway.cluster.table_follower import TableFollower

WAIT_S = 20.0
NAME = "gateway-1"


class Keeper:
    """Stands for the actor that keeps the table, at its edge of plain data."""

    def __init__(self) -> None:
        self.table = ModelTable(version=1)
        self.polls: list[tuple[int, str, dict[str, int]]] = []
        self.errors: list[Exception] = []
        self.num_finds = 0
        self._polled = asyncio.Event()

    async def find(self) -> Keeper:
        self.num_finds += 1
        return self

    async def call(self, method: str, /, *details: Any, **named: Any) -> Any:
        if self.errors:
            raise self.errors.pop(0)
        if method != "wait_table":
            return to_plain(self.table)
        known, timeout_s, name, calls = details
        self.polls.append((known, name, dict(calls)))
        self._polled.set()
        if known == self.table.version:
            await asyncio.sleep(timeout_s)
        return None if known == self.table.version else to_plain(self.table)

    async def wait_polls(self, is_done: Callable[[list[int]], bool]) -> None:
        """Wait until the known versions of all polls are as wanted."""
        while not is_done([known for known, _, _ in self.polls]):
            self._polled.clear()
            await self._polled.wait()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_FIND_S", "_RETRY_S", "_POLL_S", "_FAST_POLL_S"):
        monkeypatch.setattr(table_follower, name, 0.001)


def run(
    test: Callable[[Keeper, TableFollower], Awaitable[None]],
    apply: Callable[[ModelTable], Any],
) -> None:
    async def limited() -> None:
        keeper = Keeper()
        follower = TableFollower(keeper.find, NAME, lambda: Counter({"f": 2}), apply)
        follower.start()
        try:
            async with asyncio.timeout(WAIT_S):
                await test(keeper, follower)
        finally:
            follower.stop()

    asyncio.run(limited())


def test_a_replica_reports_the_table_that_it_serves_and_its_calls() -> None:
    applied: list[int] = []

    async def apply(table: ModelTable) -> bool:
        applied.append(table.version)
        return True

    async def test(keeper: Keeper, follower: TableFollower) -> None:
        await keeper.wait_polls(lambda known: 1 in known)
        keeper.table.changed()
        await keeper.wait_polls(lambda known: known.count(2) > 1)
        assert applied == [1, 2]
        assert keeper.polls[0] == (0, NAME, {"f": 2})
        assert follower.table is not None
        assert follower.table.version == 2
        assert keeper.num_finds == 1

    run(test, apply)


def test_a_table_that_is_not_served_wholly_is_applied_again() -> None:
    """The replica sends no calls to fleets that it lacks: others may end them meanwhile."""
    results = iter([False, False, True])
    applied: list[int] = []
    is_served = asyncio.Event()

    async def apply(table: ModelTable) -> bool:
        applied.append(table.version)
        is_whole = next(results)
        if is_whole:
            is_served.set()
        return is_whole

    async def test(keeper: Keeper, follower: TableFollower) -> None:
        await keeper.wait_polls(lambda known: 1 in known)
        assert applied == [1]
        await is_served.wait()
        keeper.table.changed()
        results_left = iter([True])
        nonlocal results
        results = results_left
        await keeper.wait_polls(lambda known: 2 in known)
        assert applied == [1, 1, 1, 2]

    run(test, apply)


def test_a_long_change_is_no_silence() -> None:
    """Else the replica would be taken for dead, and its calls would end with their fleet."""
    may_end = asyncio.Event()

    async def apply(table: ModelTable) -> bool:
        await may_end.wait()
        return True

    async def test(keeper: Keeper, follower: TableFollower) -> None:
        await keeper.wait_polls(lambda known: known.count(0) > 3)
        assert follower.table is None
        may_end.set()
        await keeper.wait_polls(lambda known: 1 in known)

    run(test, apply)


def test_a_change_goes_on_while_the_actor_is_away() -> None:
    may_end = asyncio.Event()
    applied: list[int] = []

    async def apply(table: ModelTable) -> bool:
        await may_end.wait()
        applied.append(table.version)
        return True

    async def test(keeper: Keeper, follower: TableFollower) -> None:
        await keeper.wait_polls(lambda known: known.count(0) > 1)
        keeper.errors += [RuntimeError("the actor has died")] * 3
        while keeper.errors:
            await asyncio.sleep(0.001)
        may_end.set()
        await keeper.wait_polls(lambda known: 1 in known)
        assert applied == [1]

    run(test, apply)


def test_a_lost_actor_is_found_again() -> None:
    async def apply(table: ModelTable) -> bool:
        return True

    async def test(keeper: Keeper, follower: TableFollower) -> None:
        await keeper.wait_polls(lambda known: 1 in known)
        keeper.errors.append(RuntimeError("the actor has died"))
        while keeper.num_finds < 2:
            await asyncio.sleep(0)
        keeper.table.changed()
        await keeper.wait_polls(lambda known: 2 in known)

    run(test, apply)


def test_orders_raise_what_their_sender_can_mend() -> None:
    async def apply(table: ModelTable) -> bool:
        return True

    async def test(keeper: Keeper, follower: TableFollower) -> None:
        await keeper.wait_polls(lambda known: 1 in known)
        follower.stop()
        await asyncio.sleep(0)
        keeper.errors.append(ConflictError("b is active already"))
        with pytest.raises(ConflictError, match="active already"):
            await follower.order("change", "promote", model="m")
        keeper.errors.append(RuntimeError("the actor has died"))
        with pytest.raises(NotReadyError, match="cannot be changed now"):
            await follower.order("change", "promote", model="m")
        assert (await follower.order("change", "promote", model="m")).version == 1

    run(test, apply)
