"""``--serve-proxy``: Ray Serve's own HTTP endpoint, as Serve has it, beside the gateway's."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from benchmarks.harness.distributed import free_ports
from benchmarks.harness.server import GOOD, WAIT_S, Served, running_server
from cluster.config.gateway import GatewaySection
from cluster.launch.readiness import wait_ready
from tests.gateway.sse_client import parse_events

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": dict(GOOD),
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"input": "hi", "max_output_tokens": 4, "temperature": 0},
    "/v1/messages": {**CHAT, "model": "expertmesh-demo"},
    "/v1/embeddings": {"input": "hi"},
    "/classify": {"input": "hi", "labels": ["a", "b"]},
    "/score": {"queries": "hi", "documents": ["hi", "ho"]},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [5, 6]},
}
STREAMS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
CHANGING = {"id", "created", "created_at", "completed_at", "request_id", "response_id", "item_id"}
"""Fields that differ from answer to answer."""


@dataclass(slots=True)
class Both:
    """One gateway and its two ways in."""

    server: Served
    proxied: httpx.Client


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    (port,) = free_ports(1)
    words = ["--serve-proxy", str(port), "--state-dir", str(tmp_path_factory.mktemp("kept"))]
    with (
        running_server(tmp_path_factory.mktemp("state"), *words) as server,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_S) as proxied,
    ):
        yield Both(server, proxied)


def same(value: Any) -> Any:
    """An answer without what differs from answer to answer."""
    if isinstance(value, dict):
        return {k: same(inner) for k, inner in value.items() if k not in CHANGING}
    return [same(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("path", BODIES)
def test_every_protocol_answers_as_on_the_gateway_s_own_port(both: Both, path: str) -> None:
    answers = []
    for client in (both.server.client, both.proxied):
        response = client.post(path, json=BODIES[path], headers={"x-request-id": "mine"})
        assert response.status_code == 200, response.text
        assert response.headers.get_list("x-request-id") == ["mine"]
        answers.append(without_usage(same(response.json())))
    assert answers[0] == answers[1]


def without_usage(answer: Any) -> Any:
    """The second answer finds the prompt in the cache."""
    return {k: v for k, v in answer.items() if k != "usage"} if isinstance(answer, dict) else answer


@pytest.mark.parametrize("path", STREAMS)
def test_every_protocol_streams(both: Both, path: str) -> None:
    with both.proxied.stream("POST", path, json={**BODIES[path], "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        text = "".join(response.iter_text())
    if path == "/v1/completions":
        parts = [event["choices"][0]["text"] for event in parse_events(text) if event["choices"]]
        whole = both.server.complete(**GOOD)
        assert "".join(parts) == whole["choices"][0]["text"]
    else:
        assert text.count("data: ") > 2


def test_stored_files_and_batches(both: Both) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": dict(GOOD)}
    upload = {"file": ("in.jsonl", json.dumps(line).encode())}
    stored = both.proxied.post("/v1/files", files=upload, data={"purpose": "batch"})
    assert stored.status_code == 200, stored.text
    content = both.proxied.get(f"/v1/files/{stored.json()['id']}/content")
    assert json.loads(content.content) == line
    asked = {"input_file_id": stored.json()["id"], "endpoint": "/v1/completions"}
    made = both.proxied.post("/v1/batches", json={**asked, "completion_window": "24h"})
    assert made.status_code == 200, made.text


def test_errors_are_the_gateway_s(both: Both) -> None:
    for client in (both.server.client, both.proxied):
        response = client.post("/v1/completions", json={"prompt": 7.5})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
    assert both.proxied.get("/-/routes").json() == {"/": "expertmesh"}


def test_the_gateway_s_own_port_does_not_need_the_proxy(both: Both) -> None:
    """Killed, it comes back by itself, as Serve has it."""
    expected = both.server.complete(**GOOD)["choices"]
    killed = both.server.pid_of("ProxyActor")
    os.kill(killed, signal.SIGKILL)
    assert both.server.complete(**GOOD)["choices"] == expected
    url = str(both.proxied.base_url).rstrip("/")
    wait_ready(url, GatewaySection(), list)
    assert both.server.pid_of("ProxyActor") != killed
