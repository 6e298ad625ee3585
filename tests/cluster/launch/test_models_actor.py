"""The actor that keeps the table of models, with fleets that only record what is done to them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any

import pytest

from cluster.core.codec import from_plain, to_plain
from cluster.core.errors import ConfigError, ConflictError, RequestError, StartError
from cluster.core.fleets import namespace_of
from cluster.core.model_table import (
    FIRST_REVISION,
    ModelTable,
    Revision,
    RevisionState,
    ServedModelEntry,
)
from cluster.launch import gateway_calls, models_actor
from cluster.launch.model_plan import ModelPlan
from cluster.launch.models_actor import ModelsActor
from cluster.launch.ray_fleets import LoadOrder

MODEL, SECOND = "m", "b"
GATEWAY = "gateway-1"
WAIT_S = 20.0


class RecordingFleets:
    """Fleets without processes."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.failing: set[str] = set()
        """Fleets that cannot be started."""
        self.may_start = threading.Event()
        self.may_start.set()
        self.table: dict[str, Any] | None = None
        self.is_full = False
        """Whether no table can be stored."""

    def plan(
        self,
        order: LoadOrder,
        first: ModelPlan,
        base: ModelPlan | None,
        others: Iterable[ModelPlan],
        fleet: str,
    ) -> dict[str, Any]:
        if "max_num_seqs" in order.settings:
            raise ConfigError("max_num_seqs", 0, "must be at least 1")
        return {"fleet": fleet}

    def start(self, plan: Mapping[str, Any], on_progress: Callable[[int, int], None]) -> None:
        self.may_start.wait(WAIT_S)
        on_progress(1, 2)
        self.events.append(f"start {plan['fleet']}")
        if plan["fleet"] in self.failing:
            raise StartError("expert-0", "no such tensor")

    def stop(self, namespace: str) -> None:
        self.events.append(f"stop {namespace}")

    def keep(self, table: Mapping[str, Any]) -> None:
        if self.is_full:
            raise OSError("no room")
        self.table = dict(table)

    def kept(self) -> dict[str, Any] | None:
        return self.table


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are plain names of fleets; a new actor does not wait for gateways."""
    monkeypatch.setattr(models_actor, "as_plan", lambda plan: plan)
    monkeypatch.setattr(models_actor, "renamed", lambda plan, fleet: {"fleet": fleet})
    monkeypatch.setattr(gateway_calls, "SETTLE_S", 0.0)
    monkeypatch.setattr(models_actor, "_TICK_S", 0.001)
    monkeypatch.setattr(models_actor, "_RETRY_S", 0.001)


def first_table(cluster: str = "c") -> dict[str, Any]:
    revision = Revision(FIRST_REVISION, "", {"fleet": ""}, RevisionState.READY)
    entry = ServedModelEntry(MODEL, FIRST_REVISION, [revision])
    return dict(to_plain(ModelTable([entry], cluster, num_fleets=1)))


def order(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "revision": SECOND, "settings": {}, **fields}


def run(test: Callable[[RecordingFleets], Coroutine[Any, Any, None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(WAIT_S):
            await test(RecordingFleets())

    asyncio.run(limited())


async def states(actor: ModelsActor) -> dict[str, str]:
    table = from_plain(await actor.table(), ModelTable)
    return {one.name: one.state.value for _, one in table}


async def follow(
    actor: ModelsActor, is_done: Callable[[ModelTable], bool], calls: Mapping[str, int]
) -> ModelTable:
    """Poll as a gateway until the table is as wanted; return it."""
    table = ModelTable(version=0)
    while not is_done(table):
        found = await actor.wait_table(table.version, 0.01, GATEWAY, dict(calls))
        table = table if found is None else from_plain(found, ModelTable)
    return table


def is_in(state: RevisionState, name: str = SECOND) -> Callable[[ModelTable], bool]:
    return lambda table: any(one.name == name and one.state is state for _, one in table)


def test_a_revision_is_loaded_beside_the_active_one() -> None:
    async def test(fleets: RecordingFleets) -> None:
        actor = ModelsActor(first_table(), fleets)
        await actor.load(order(percent=5.0))
        table = await follow(actor, is_in(RevisionState.READY), {})
        model = table.find(MODEL)
        assert (model.active, model.canary and model.canary.percent) == (FIRST_REVISION, 5.0)
        assert fleets.events == ["start model-1"]
        assert await actor.active_fleets() == ([""], False)
        assert await actor.wait_table(table.version, 0.001, GATEWAY, {}) is None

    run(test)


def test_a_revision_that_cannot_start_leaves_the_active_one() -> None:
    async def test(fleets: RecordingFleets) -> None:
        fleets.failing = {"model-1"}
        actor = ModelsActor(first_table(), fleets)
        await actor.load(order(percent=5.0))
        table = await follow(actor, is_in(RevisionState.FAILED), {})
        model = table.find(MODEL)
        assert (model.active, model.canary) == (FIRST_REVISION, None)
        assert "no such tensor" in model.find(SECOND).error
        assert fleets.events == ["start model-1", f"stop {namespace_of('model-1')}"]

    run(test)


def test_a_replaced_fleet_ends_after_its_calls_and_before_the_new_one_starts() -> None:
    async def test(fleets: RecordingFleets) -> None:
        calls = {"": 1}
        actor = ModelsActor(first_table(), fleets)
        await actor.load(order(in_place=True))
        table = await follow(actor, is_in(RevisionState.WAITING), calls)
        for _ in range(20):  # the gateway still runs a call
            await actor.wait_table(table.version, 0.001, GATEWAY, calls)
        assert (await states(actor), fleets.events) == (
            {FIRST_REVISION: "READY", SECOND: "WAITING"},
            [],
        )
        calls.clear()
        table = await follow(actor, is_in(RevisionState.READY), calls)
        model = table.find(MODEL)
        assert (model.active, model.previous, model.is_held) == (SECOND, FIRST_REVISION, False)
        assert fleets.events == [f"stop {namespace_of('')}", "start model-1"]

    run(test)


def test_the_replaced_revision_returns_if_the_new_one_fails() -> None:
    async def test(fleets: RecordingFleets) -> None:
        fleets.failing = {"model-1"}
        actor = ModelsActor(first_table(), fleets)
        await actor.load(order(in_place=True))
        table = await follow(
            actor, lambda table: table.version > 1 and not table.find(MODEL).is_held, {}
        )
        model = table.find(MODEL)
        assert (model.active, model.find(FIRST_REVISION).fleet) == (FIRST_REVISION, "model-2")
        assert await states(actor) == {FIRST_REVISION: "READY", SECOND: "FAILED"}
        assert fleets.events[-1] == "start model-2"

    run(test)


@pytest.mark.parametrize("num_failures", [2, 3])
def test_a_replaced_revision_that_cannot_return_at_once_is_tried_again(
    num_failures: int,
) -> None:
    async def test(fleets: RecordingFleets) -> None:
        fleets.failing = {f"model-{number}" for number in range(1, num_failures + 2)}
        actor = ModelsActor(first_table(), fleets)
        await actor.load(order(in_place=True))
        table = await follow(
            actor, lambda table: table.version > 1 and not table.find(MODEL).is_held, {}
        )
        returns = num_failures < 3
        assert table.find(MODEL).active == FIRST_REVISION
        assert await states(actor) == {
            FIRST_REVISION: "READY" if returns else "FAILED",
            SECOND: "FAILED",
        }
        assert fleets.events.count("start model-4") == 1, "the third and last start"
        assert "start model-5" not in fleets.events

    run(test)


def test_a_model_is_loading_between_two_tries_to_return(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its launcher would end the cluster."""
    monkeypatch.setattr(models_actor, "_RETRY_S", WAIT_S)

    async def test(fleets: RecordingFleets) -> None:
        fleets.failing = {"model-1", "model-2"}
        actor = ModelsActor(first_table(), fleets)
        await actor.load(order(in_place=True))

        table = await actor.table()
        while table["models"][0]["revisions"][0]["fleet"] != "model-3":  # not stored meanwhile
            await asyncio.sleep(0)
            table = await actor.table()
        assert await actor.active_fleets() == ([], True)
        with pytest.raises(ConflictError, match="is being loaded"):
            await actor.load(order(revision="c"))

    run(test)


def test_a_restarted_actor_continues_a_load() -> None:
    async def test(fleets: RecordingFleets) -> None:
        fleets.may_start.clear()
        actor = ModelsActor(first_table(), fleets)
        await actor.load(order())
        restarted = ModelsActor(first_table(), fleets)
        fleets.may_start.set()
        await follow(restarted, is_in(RevisionState.READY), {})
        assert fleets.events.count("start model-1") == 2  # of the lost actor, and again

    run(test)


def test_a_table_of_another_cluster_is_not_continued() -> None:
    async def test(fleets: RecordingFleets) -> None:
        await ModelsActor(first_table("old"), fleets).load(order())
        assert await states(ModelsActor(first_table("new"), fleets)) == {FIRST_REVISION: "READY"}

    run(test)


def test_gateways_get_stored_tables_only() -> None:
    """Else a restarted actor would know less than they do."""

    async def test(fleets: RecordingFleets) -> None:
        actor = ModelsActor(first_table(), fleets)
        fleets.is_full = True
        with pytest.raises(OSError, match="no room"):
            await actor.load(order())
        assert await states(actor) == {FIRST_REVISION: "READY", SECOND: "LOADING"}
        assert await actor.wait_table(1, 0.01, GATEWAY, {}) is None
        assert fleets.events == [], "a restarted actor would not know the fleet"
        fleets.is_full = False
        await follow(actor, is_in(RevisionState.READY), {})
        assert fleets.events == ["start model-1"]

    run(test)


def test_a_canary_cannot_have_the_name_of_the_active_revision() -> None:
    async def test(fleets: RecordingFleets) -> None:
        fleets.failing = {f"model-{number}" for number in range(1, 9)}
        actor = ModelsActor(first_table(), fleets)
        await actor.load(order(in_place=True))
        await follow(actor, lambda table: table.version > 1 and not table.find(MODEL).is_held, {})
        with pytest.raises(ConflictError, match="it has all requests"):
            await actor.load(order(revision=FIRST_REVISION, percent=5.0))
        assert await states(actor) == {FIRST_REVISION: "FAILED", SECOND: "FAILED"}

    run(test)


def test_an_unloaded_fleet_ends_after_its_calls() -> None:
    async def test(fleets: RecordingFleets) -> None:
        calls = {"model-1": 1}
        actor = ModelsActor(first_table(), fleets)
        await actor.load(order())
        await follow(actor, is_in(RevisionState.READY), calls)
        await actor.change("unload", model=MODEL, revision=SECOND)
        table = await follow(actor, is_in(RevisionState.RETIRING), calls)
        for _ in range(20):
            await actor.wait_table(table.version, 0.001, GATEWAY, calls)
        assert f"stop {namespace_of('model-1')}" not in fleets.events
        await follow(actor, lambda table: table.version > 1 and not is_known(table), {})
        assert fleets.events[-1] == f"stop {namespace_of('model-1')}"

    def is_known(table: ModelTable) -> bool:
        return any(one.name == SECOND for _, one in table)

    run(test)


def test_orders_are_refused_by_name() -> None:
    async def test(fleets: RecordingFleets) -> None:
        actor = ModelsActor(first_table(), fleets)
        for fields, param in (
            ({"settings": {"max_num_seqs": 0}}, "max_num_seqs"),
            ({"in_place": True, "percent": 5.0}, "percent"),
            ({"in_place": True, "keys": ["team"]}, "keys"),
            ({"revision": "a b"}, "revision"),
        ):
            with pytest.raises(RequestError) as caught:
                await actor.load(order(**fields))
            assert caught.value.param == param
        with pytest.raises(ConflictError, match="the only model that serves"):
            await actor.change("unload", model=MODEL)
        assert await states(actor) == {FIRST_REVISION: "READY"}

    run(test)
