"""Which gateways a replica makes and ends as the table of models says."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cluster.config.cluster import ClusterConfig
from cluster.config.gateway import GatewaySection
from cluster.config.model import ModelSection
from cluster.core.errors import NotReadyError
from cluster.core.model_table import (
    FIRST_REVISION,
    ModelTable,
    Revision,
    RevisionState,
    ServedModelEntry,
    cluster_id,
)
from gateway import model_set
from gateway.calls.gateway import Gateway
from gateway.calls.served_models import SharedParts
from gateway.core.tuning import GatewayTuning
from gateway.model_set import ModelSet
from tests.gateway.fakes import FakeController, save_tiny_tokenizer
from tests.gateway.stack import WAIT_S

TOKEN = "first"
MODEL, SECOND = "m", "b"


def config_of(folder: Path, fleet: str = "", token: str = TOKEN) -> dict[str, Any]:
    model = ModelSection(path=str(folder), served_model_name=MODEL)
    return dict(ClusterConfig(model=model, cluster_token=token, fleet=fleet).to_dict())


def revision_of(folder: Path, name: str, fleet: str, state: RevisionState) -> Revision:
    return Revision(name, fleet, {"config": config_of(folder, fleet)}, state)


def table_of(*revisions: Revision, active: str, token: str = TOKEN) -> ModelTable:
    return ModelTable([ServedModelEntry(MODEL, active, list(revisions))], cluster_id(token))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_tokenizer(tmp_path / "checkpoint")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Controllers are fakes whose clusters have no workers; gateways do not wait for these."""

    async def find(namespace: str) -> FakeController:
        return FakeController()

    monkeypatch.setattr(model_set, "find_controller", find)
    monkeypatch.setattr(model_set, "_READY_LIMIT_S", 0.0)


def run(test: Callable[[ModelSet], Coroutine[Any, Any, None]]) -> None:
    async def limited() -> None:
        tuning = GatewayTuning()
        shared = SharedParts.of(GatewaySection(), tuning)
        models = ModelSet("gateway-1", "127.0.0.1", tuning, shared)
        try:
            async with asyncio.timeout(WAIT_S):
                await test(models)
        finally:
            for gateway in list(shared.models):
                await gateway.cluster.leave()
            await models.close()

    asyncio.run(limited())


def test_a_restarted_replica_begins_with_the_revisions_that_serve(
    folder: Path, tmp_path: Path
) -> None:
    """The checkpoint with which the cluster started may be gone."""
    gone = tmp_path / "gone"
    table = table_of(
        revision_of(folder, SECOND, "model-1", RevisionState.READY),
        revision_of(gone, FIRST_REVISION, "", RevisionState.RETIRING),
        active=SECOND,
    )

    async def test(models: ModelSet) -> None:
        await models.add_first([config_of(gone)], table)
        assert models.num_calls() == {"model-1": 0}
        assert models.shared.models.find(MODEL).revision == SECOND

    run(test)


@pytest.mark.parametrize("case", ["no table", "of another cluster", "none ready"])
def test_without_a_table_that_helps_the_configured_models_are_used(
    folder: Path, tmp_path: Path, case: str
) -> None:
    state = RevisionState.FAILED if case == "none ready" else RevisionState.READY
    other = "another" if case == "of another cluster" else TOKEN
    revision = revision_of(tmp_path / "gone", SECOND, "model-1", state)
    revision.plan = {"config": config_of(tmp_path / "gone", "model-1", token=other)}
    table = None if case == "no table" else table_of(revision, active=SECOND, token=other)

    async def test(models: ModelSet) -> None:
        await models.add_first([config_of(folder)], table)
        assert models.num_calls() == {"": 0}

    run(test)


def test_a_replica_that_begins_with_a_table_is_ready_once_it_is_applied(
    folder: Path, tmp_path: Path
) -> None:
    """Before, calls for other revisions would go astray."""
    broken = damaged(tmp_path / "broken")
    ready = revision_of(folder, SECOND, "model-1", RevisionState.READY)
    table = table_of(ready, active=SECOND)
    held = revision_of(folder, FIRST_REVISION, "model-2", RevisionState.STOPPED)
    lost = revision_of(broken, FIRST_REVISION, "model-3", RevisionState.READY)
    table.models += [
        ServedModelEntry("replaced", FIRST_REVISION, [held], is_held=True),
        ServedModelEntry("broken", FIRST_REVISION, [lost]),
    ]

    async def test(models: ModelSet) -> None:
        served = models.shared.models
        await models.add_first([config_of(folder)], table)
        assert models.num_calls() == {"model-1": 0}
        assert served.route_of("replaced").is_held
        with pytest.raises(NotReadyError):
            served.find("broken")
        assert served.not_ready_reasons() == ["the revisions of the models are not known yet"]
        assert not await models.apply(table), "one model cannot be served here"
        assert "not known yet" not in str(served.not_ready_reasons())

    run(test)


def damaged(folder: Path) -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_text("not whole yet")
    return folder


def test_a_revision_that_cannot_be_served_here_is_tried_again(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    late = damaged(tmp_path / "late")
    table = table_of(
        revision_of(folder, FIRST_REVISION, "", RevisionState.READY),
        revision_of(late, SECOND, "model-1", RevisionState.READY),
        active=FIRST_REVISION,
    )

    async def test(models: ModelSet) -> None:
        await models.add_first([config_of(folder)], None)
        assert not await models.apply(table)
        assert "revision b cannot be served" in caplog.text
        route = models.shared.models.route_of(MODEL)
        assert list(route.revisions) == [FIRST_REVISION]
        shutil.copytree(folder, late, dirs_exist_ok=True)
        assert await models.apply(table)
        assert list(route.revisions) == [FIRST_REVISION, SECOND]

    run(test)


def test_calls_wait_until_this_replica_can_serve_the_revision_in_place(folder: Path) -> None:
    first = revision_of(folder, FIRST_REVISION, "", RevisionState.STOPPED)
    second = revision_of(folder, SECOND, "model-1", RevisionState.LOADING)
    table = table_of(first, second, active=FIRST_REVISION)

    async def test(models: ModelSet) -> None:
        await models.add_first([config_of(folder)], None)
        table.models[0].is_held = True
        assert await models.apply(table)
        route = models.shared.models.route_of(MODEL)
        table.models[0].is_held, table.models[0].active = False, SECOND
        second.state = RevisionState.READY
        assert not await models.apply(table)
        assert route.is_held, "no controller has answered"
        connect(route.revisions[SECOND])
        assert await models.apply(table)
        assert not route.is_held
        route.update(SECOND, route.revisions, standby=route.standby, is_held=True)
        second.state = RevisionState.FAILED
        assert await models.apply(table)
        assert not route.is_held, "it will not serve"

    run(test)


def test_calls_wait_for_a_connection_for_a_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_set, "_HOLD_LIMIT_S", 0.0)
    table = table_of(
        revision_of(folder, FIRST_REVISION, "", RevisionState.READY), active=FIRST_REVISION
    )

    async def test(models: ModelSet) -> None:
        await models.add_first([config_of(folder)], None)
        route = models.shared.models.route_of(MODEL)
        route.update(FIRST_REVISION, route.revisions, standby=route.gateway, is_held=True)
        assert await models.apply(table)
        assert not route.is_held, "its workers may be lost"

    run(test)


def test_a_revision_that_is_not_connected_gets_no_calls_beside_one_that_is(folder: Path) -> None:
    table = table_of(
        revision_of(folder, FIRST_REVISION, "", RevisionState.READY),
        revision_of(folder, SECOND, "model-1", RevisionState.READY),
        active=SECOND,
    )

    async def test(models: ModelSet) -> None:
        await models.add_first([config_of(folder)], None)
        route = models.shared.models.route_of(MODEL)
        connect(route.revisions[FIRST_REVISION])
        assert not await models.apply(table)
        assert list(route.revisions) == [FIRST_REVISION]
        assert route.standby is not None
        connect(route.standby)
        assert await models.apply(table)
        assert list(route.revisions) == [FIRST_REVISION, SECOND]

    run(test)


def test_a_leaving_replica_holds_no_calls_for_readiness(folder: Path) -> None:
    first = revision_of(folder, FIRST_REVISION, "", RevisionState.READY)
    table = table_of(first, active=FIRST_REVISION)

    async def test(models: ModelSet) -> None:
        await models.add_first([config_of(folder)], None)
        route = models.shared.models.route_of(MODEL)
        route.update(FIRST_REVISION, route.revisions, standby=route.gateway, is_held=True)
        assert not await models.apply(table)
        assert route.is_held
        route.gateway.leave(0.0)
        assert await models.apply(table)
        assert not route.is_held

    run(test)


def connect(gateway: Gateway) -> None:
    """As after its controller has answered, and workers have connected."""
    gateway.readiness.not_ready_reasons = lambda is_whole=True: []  # type: ignore[method-assign]


def test_a_gateway_with_calls_does_not_end(folder: Path) -> None:
    first = revision_of(folder, FIRST_REVISION, "", RevisionState.READY)
    second = revision_of(folder, SECOND, "model-1", RevisionState.READY)

    async def test(models: ModelSet) -> None:
        await models.add_first([config_of(folder)], None)
        assert await models.apply(table_of(first, second, active=FIRST_REVISION))
        gateway = models.shared.models.route_of(MODEL).revisions[SECOND]
        with ExitStack() as call:
            gateway.count_call(call)
            assert not await models.apply(table_of(first, active=FIRST_REVISION))
            assert models.num_calls() == {"": 0, "model-1": 1}
        assert await models.apply(table_of(first, active=FIRST_REVISION))
        assert models.num_calls() == {"": 0}

    run(test)


def test_the_gateway_of_an_ended_fleet_keeps_nothing(folder: Path) -> None:
    first = revision_of(folder, FIRST_REVISION, "", RevisionState.READY)
    second = revision_of(folder, SECOND, "model-1", RevisionState.READY)

    async def test(models: ModelSet) -> None:
        await models.add_first([config_of(folder)], None)
        assert await models.apply(table_of(first, second, active=FIRST_REVISION))
        gateways = list(models.shared.models)
        second.state = RevisionState.RETIRING
        assert await models.apply(table_of(first, second, active=FIRST_REVISION))
        assert list(models.shared.models) == gateways, "calls may run on it"
        assert await models.apply(table_of(first, active=FIRST_REVISION))
        assert list(models.shared.models) == gateways[:1]
        ended = gateways[1].cluster
        assert (ended._listeners, ended.snapshot, ended._controller) == ([], None, None)
        assert models.num_calls() == {"": 0}

    run(test)


def test_a_model_is_described_while_its_revision_returns_in_another_fleet(folder: Path) -> None:
    first = revision_of(folder, FIRST_REVISION, "", RevisionState.READY)
    second = revision_of(folder, SECOND, "model-1", RevisionState.WAITING)
    table = table_of(first, second, active=FIRST_REVISION)
    table.models[0].is_held = True

    async def test(models: ModelSet) -> None:
        await models.add_first([config_of(folder)], None)
        route = models.shared.models.route_of(MODEL)
        old = route.gateway
        for state, failed, fleet in (
            (RevisionState.READY, RevisionState.WAITING, ""),
            (RevisionState.STOPPED, RevisionState.LOADING, ""),
            (RevisionState.LOADING, RevisionState.FAILED, "model-2"),
        ):
            first.state, second.state, first.fleet = state, failed, fleet
            assert await models.apply(table)
            assert route.gateway is old
        first.state, table.models[0].is_held = RevisionState.READY, False
        first.plan = {"config": config_of(folder, "model-2")}
        assert not await models.apply(table), "it is not connected"
        assert route.gateway is not old
        assert models.num_calls() == {"model-2": 0}

    run(test)
