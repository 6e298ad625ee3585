"""Which revision of a model serves a call."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.core.errors import ModelNotFoundError, NotReadyError, QueueFullError
from cluster.core.model_table import Canary
from gateway.auth.auth import CALLER, KeyRing
from gateway.calls import model_routes
from gateway.calls.model_routes import ModelRoute
from gateway.core.call import CallKind, GenerateCall

ACTIVE, OTHER = "1", "b"
ADAPTER = "sql"


def revision(name: str, *adapters: str) -> Any:
    """Stands for the ``Gateway`` of a revision, of which a route reads the names that it knows."""
    names = ("m", *adapters)
    return SimpleNamespace(name=name, model=SimpleNamespace(knows=lambda asked: asked in names))


def make_route(percent: float | None = None, keys: tuple[str, ...] = ()) -> ModelRoute:
    canary = None if percent is None else Canary(OTHER, percent, keys)
    revisions = {ACTIVE: revision(ACTIVE, ADAPTER), OTHER: revision(OTHER)}
    return ModelRoute("m", ACTIVE, revisions, canary)


def picked(route: ModelRoute, **fields: Any) -> str:
    gateway: Any = route.pick(GenerateCall(kind=CallKind.COMPLETION, **fields))
    return str(gateway.name)


def test_a_call_runs_on_the_active_revision() -> None:
    assert picked(make_route()) == ACTIVE
    assert picked(make_route(percent=0.0, keys=("team",))) == ACTIVE


def test_a_named_revision_serves_or_is_refused() -> None:
    assert picked(make_route(), revision=OTHER) == OTHER
    with pytest.raises(ModelNotFoundError, match="no revision 'x'") as caught:
        picked(make_route(), revision="x")
    assert caught.value.param == "x-model-revision"


def test_a_share_of_the_calls_goes_to_the_canary() -> None:
    assert picked(make_route(percent=100.0)) == OTHER
    found = [picked(make_route(percent=50.0), session_id=f"s{i}") for i in range(200)]
    assert 60 < found.count(OTHER) < 140


def test_all_gateways_agree_on_a_session() -> None:
    routes = [make_route(percent=50.0) for _ in range(2)]
    found = [[picked(route, session_id=f"s{i}") for i in range(50)] for route in routes]
    assert found[0] == found[1]


def test_a_session_stays_on_its_revision() -> None:
    route = make_route(percent=100.0)
    assert picked(route, session_id="s") == OTHER
    route.update(ACTIVE, route.revisions)
    assert picked(route, session_id="s") == OTHER
    assert picked(route, session_id="t") == ACTIVE
    route.update(ACTIVE, {ACTIVE: route.revisions[ACTIVE]})
    assert picked(route, session_id="s") == ACTIVE


def test_a_stored_response_is_continued_on_its_revision() -> None:
    assert picked(make_route(), last_revision=f"m/{OTHER}") == OTHER
    assert picked(make_route(), last_revision="m/gone") == ACTIVE
    assert picked(make_route(), last_revision=f"another/{OTHER}") == ACTIVE


def test_keys_of_the_canary_get_it() -> None:
    caller = KeyRing(["secret"]).check("Bearer secret")
    assert caller is not None
    token = CALLER.set(caller)
    try:
        assert picked(make_route(percent=0.0, keys=("team",))) == ACTIVE
        object.__setattr__(caller.entry, "name", "team")
        assert picked(make_route(percent=0.0, keys=("team",))) == OTHER
    finally:
        CALLER.reset(token)


def test_an_adapter_is_served_where_it_is_loaded() -> None:
    assert picked(make_route(percent=100.0), model=ADAPTER) == ACTIVE
    assert make_route().knows(ADAPTER)
    assert not make_route().knows("unknown")


def test_calls_wait_while_the_model_is_replaced() -> None:
    async def wait() -> None:
        route = make_route()
        route.update(ACTIVE, {}, standby=route.revisions[ACTIVE], is_held=True)
        assert route.is_held
        assert route.gateway.name == ACTIVE
        with pytest.raises(NotReadyError, match="is being replaced"):
            await route.wait_released(0.001, max_held=1)
        waiting = asyncio.create_task(route.wait_released(20.0, max_held=1))
        await asyncio.sleep(0)
        assert not waiting.done()
        with pytest.raises(QueueFullError, match=r"1 calls wait .* at most 1") as caught:
            await route.wait_released(20.0, max_held=1)
        assert caught.value.retry_after_s == 5.0
        route.update(OTHER, {OTHER: revision(OTHER)})
        await waiting
        assert picked(route) == OTHER

    asyncio.run(wait())


def test_calls_do_not_wait_for_a_revision_when_the_replica_ends() -> None:
    async def wait() -> None:
        route = make_route()
        route.update(ACTIVE, {}, standby=route.revisions[ACTIVE], is_held=True)
        waiting = asyncio.create_task(route.wait_released(20.0, max_held=1))
        await asyncio.sleep(0)
        route.end_wait()
        await waiting
        assert picked(route) == ACTIVE, "which then refuses it"
        route.update(ACTIVE, {}, standby=route.standby, is_held=True)
        assert not route.is_held, "further calls are refused too"

    asyncio.run(wait())


def test_a_model_without_any_revision_is_not_ready() -> None:
    with pytest.raises(NotReadyError, match="is being replaced"):
        _ = ModelRoute("m", ACTIVE, {}).gateway


def test_the_latest_sessions_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_routes, "_MAX_SESSIONS", 2)
    route = make_route(percent=100.0)
    for session in "abc":
        assert picked(route, session_id=session) == OTHER
    route.update(ACTIVE, route.revisions)
    assert [picked(route, session_id=session) for session in "cb"] == [OTHER, OTHER]
    assert picked(route, session_id="a") == ACTIVE
