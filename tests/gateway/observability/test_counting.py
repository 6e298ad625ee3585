"""What one replica counts: each choice ends once, each token counts once, labels are bounded."""

from __future__ import annotations

import asyncio
import contextlib

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from gateway.auth.auth import KeyRing
from gateway.http.middleware import HttpMiddleware
from tests.gateway.observability.scrape import Scrape
from tests.gateway.stack import Stack, complete, post

NAMES_OF_CLIENTS = "rubbish"
"""In everything that a client may choose."""


def scrape(stack: Stack) -> Scrape:
    return Scrape.of(stack.http.get("/metrics").text)


def leave_after(stack: Stack, num_events: int, **fields: object) -> None:
    """Read some events of a stream, and close the connection."""
    stack.engine.step_s = 0.01
    with stack.http.stream("POST", "/v1/completions", json={**fields, "stream": True}) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("data: "))
        for _ in range(num_events):
            next(lines)
    stack.wait_no_requests()


def test_tokens_of_a_call_that_is_aborted_count(stack: Stack) -> None:
    before = scrape(stack)
    leave_after(stack, 6, prompt="x", max_tokens=500, n=2)
    after = scrape(stack)
    assert 6 <= after.since(before, "generation_tokens_total") < 1000
    assert after.since(before, "request_success_total", finished_reason="abort") == 2
    assert after.since(before, "request_success_total") == 2
    assert after.since(before, "prompt_tokens_total") == 1
    for name in ("request_generation_tokens", "e2e_request_latency_seconds"):
        assert after.since(before, f"{name}_count") == 0


def test_a_failed_choice_counts_as_an_error(stack: Stack) -> None:
    before = scrape(stack)
    stack.engine.error = ("it broke", "internal_error")
    assert post(stack, "/v1/completions", prompt="x", max_tokens=5).status_code >= 500
    after = scrape(stack)
    assert after.since(before, "request_success_total", finished_reason="error") == 1
    assert after.since(before, "request_success_total") == 1


def test_a_choice_whose_time_is_over_counts_as_an_error(stack: Stack) -> None:
    """No worker reports that it is over: the gateway notices."""
    before = scrape(stack)
    stack.engine.is_paused = True
    headers = {"x-request-timeout-ms": "50"}
    answer = stack.http.post("/v1/completions", json={"prompt": "x"}, headers=headers)
    stack.engine.is_paused = False
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    after = scrape(stack)
    assert after.since(before, "request_success_total", finished_reason="error") == 1
    assert after.since(before, "request_success_total") == 1


def test_what_is_refused_counts_no_tokens(stack: Stack) -> None:
    before = scrape(stack)
    for fields in ({"prompt": ""}, {"prompt": "x", "n": -1}, {"prompt": "x", "model": "none"}):
        assert post(stack, "/v1/completions", **fields).status_code in (400, 404)
    after = scrape(stack)
    for name in ("prompt_tokens", "generation_tokens", "request_success"):
        assert after.since(before, f"{name}_total") == 0
    for name in ("request_params_n", "request_params_max_tokens", "request_prompt_tokens"):
        assert after.since(before, f"{name}_count") == 0


def test_cached_tokens_are_those_that_the_client_is_told(stack: Stack) -> None:
    before = scrape(stack)
    stack.engine.num_cached_tokens = 3
    answer = complete(stack, prompt="hello", max_tokens=4, n=2)
    after = scrape(stack)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 3
    assert after.since(before, "prompt_tokens_cached_total") == 3


def test_counters_with_known_labels_begin_at_0(stack: Stack) -> None:
    """Else Prometheus does not see the first increase."""
    found = scrape(stack)
    ends = {s.labels["finished_reason"] for s in found.samples("request_success_total")}
    assert ends == {"stop", "length", "abort", "error"}
    reasons = {s.labels["reason"] for s in found.samples("admission_rejections_total")}
    assert {"queue_full", "deadline", "key_tokens", "worker_queue_full"} <= reasons


def test_names_of_clients_are_no_labels(stack: Stack) -> None:
    complete(stack, prompt="x", max_tokens=2)
    known = scrape(stack).label_values()
    name = NAMES_OF_CLIENTS
    headers = {"x-request-id": name, "authorization": f"Bearer {name}", "user-agent": name}
    for number in range(3):
        body = {"model": f"{name}{number}", "prompt": "x", "user": name, name: name}
        stack.http.post("/v1/completions", json=body, headers=headers)
        good = {"prompt": "x", "max_tokens": 2, "user": name, "request_id": f"{name}{number}"}
        stack.http.post("/v1/completions", json={**good, "cache_salt": name}, headers=headers)
        stack.http.get(f"/{name}/{number}", params={name: name}, headers=headers)
        with contextlib.suppress(httpx.HTTPError):
            stack.http.request(f"{name.upper()}{number}", "/v1/models", headers=headers)
    found = scrape(stack).label_values()
    new = {label: values - known[label] for label, values in found.items()}
    assert new.pop("route") <= {"other", "/v1/completions", "/v1/models"}
    assert new.pop("status") <= {"200", "400", "404", "405"}
    assert new.pop("method") <= {"GET", "POST", "other"}
    assert {label: values for label, values in new.items() if values} == {}


@pytest.mark.parametrize(
    ("method", "label"), [("PATCH", "PATCH"), ("BREW", "other"), ("get", "other")]
)
def test_methods_that_no_rfc_names_are_counted_together(
    stack: Stack, method: str, label: str
) -> None:
    """Some servers pass any method on."""
    before = scrape(stack)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Message) -> None:
        pass

    async def ask() -> None:
        middleware = HttpMiddleware(app, stack.gateway, KeyRing(), [])
        scope = {"type": "http", "method": method, "path": "/x", "headers": []}
        await middleware(scope, asyncio.Queue[Message]().get, send)

    stack.run(ask())
    after = scrape(stack)
    assert after.since(before, "http_requests_total", method=label, status="204") == 1
