"""Routes about the cluster, and the application under a prefix."""

from __future__ import annotations

import asyncio

import httpx
from starlette.applications import Starlette
from starlette.routing import Mount

from gateway.protocols import build_public_app
from tests.gateway.stack import MODEL, Stack


def test_status_is_fresh_and_names_this_gateway(stack: Stack) -> None:
    stack.controller.state["history"].append({"generation": 9, "cause": "test"})
    status = stack.http.get("/cluster/v1/status").json()
    stack.controller.state["history"].pop()
    assert status["schema"] == 1
    assert status["state"] == "SERVING"
    assert status["placement_epoch"] == 3
    assert status["history"][-1]["generation"] == 9
    assert {worker["role"] for worker in status["workers"]} == {"attention", "expert"}
    assert status["gateway"] == [{"name": "gateway-test"}]


def test_placement_load_and_events(stack: Stack) -> None:
    placement = stack.http.get("/cluster/v1/placement").json()
    assert placement["banks"][0]["physical_to_logical"] == [[0, 1], [2, 3]]
    load = stack.http.get("/cluster/v1/load").json()
    assert (load["schema"], load["banks"][0]["load"]) == (1, [1, 2, 3, 4])
    assert load["banks"][0]["slots"] == [[1, 2], [3, 4]]
    events = stack.http.get("/cluster/v1/events").json()
    assert events["events"][0]["cause"] == "start"


def test_version(stack: Stack) -> None:
    version = stack.http.get("/version").json()
    assert next(iter(version)) == "version"
    assert set(version) == {"version", "ray", "torch", "model", "placement_epoch"}
    assert version["model"] == MODEL


def test_health_is_empty(stack: Stack) -> None:
    response = stack.http.get("/health")
    assert (response.status_code, response.content) == (200, b"")
    assert stack.http.head("/health").status_code == 200


def test_the_app_works_under_any_prefix(stack: Stack) -> None:
    outer = Starlette(routes=[Mount("/any/prefix", build_public_app(stack.gateway))])

    async def work() -> None:
        transport = httpx.ASGITransport(outer)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            prefix = "/any/prefix"
            assert (await client.get(f"{prefix}/health")).status_code == 200
            assert (await client.get(f"{prefix}/v1/models/{MODEL}")).status_code == 200
            unknown = await client.get(f"{prefix}/nope")
            assert unknown.json()["error"]["code"] == "not_found"
            answer = await client.post(
                f"{prefix}/v1/completions", json={"prompt": "x", "max_tokens": 2}
            )
            assert answer.json()["usage"]["completion_tokens"] == 2
            stream = await client.post(
                f"{prefix}/v1/completions", json={"prompt": "x", "max_tokens": 2, "stream": True}
            )
            assert stream.text.endswith("data: [DONE]\n\n")

    stack.run(work())
    text = stack.gateway.metrics.render().decode()
    assert "/any/prefix" not in text
    assert asyncio.iscoroutinefunction(work)
