"""Web pages of other origins, and headers for debugging: both off unless asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster.config.gateway import GatewaySection
from tests.gateway.stack import Stack, running_stack

PAGE = "https://chat.example"
ASKS = {"origin": PAGE, "access-control-request-method": "POST"}
PATH = "/v1/completions"
ALLOWED = "access-control-allow-origin"


@pytest.fixture(scope="module")
def open_stack() -> Iterator[Stack]:
    """A gateway for pages of one origin, with keys."""
    section = GatewaySection(cors_origins=(PAGE,), debug_headers=True, api_keys=("secret",))
    with running_stack(section) as stack:
        yield stack


def test_pages_of_other_origins_are_not_let_in_unasked(stack: Stack) -> None:
    preflight = stack.http.options(PATH, headers=ASKS)
    assert preflight.status_code == 405
    answer = stack.http.post(PATH, json={"prompt": "x", "max_tokens": 1}, headers={"origin": PAGE})
    assert ALLOWED not in answer.headers
    assert "x-expertmesh-replica" not in answer.headers


def test_pages_of_an_origin_that_is_allowed(open_stack: Stack) -> None:
    headers = {**ASKS, "access-control-request-headers": "authorization,content-type"}
    preflight = open_stack.http.options(PATH, headers=headers)  # browsers send no key with it
    assert (preflight.status_code, preflight.headers[ALLOWED]) == (200, PAGE)
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    body = {"prompt": "x", "max_tokens": 2, "stream": True}
    key = {"authorization": "Bearer secret", "origin": PAGE}
    answer = open_stack.http.post(PATH, json=body, headers=key)
    assert (answer.status_code, answer.headers[ALLOWED]) == (200, PAGE)
    assert answer.headers["x-expertmesh-replica"] == "gateway-test"
    readable = answer.headers["access-control-expose-headers"].split(", ")
    retries = {"x-request-id", "retry-after", "retry-after-ms", "x-should-retry"}
    assert retries | {"openai-processing-ms", "x-expertmesh-replica"} <= set(readable)
    refused = open_stack.http.post(PATH, json=body, headers={"origin": PAGE})
    assert (refused.status_code, refused.headers[ALLOWED]) == (401, PAGE)  # the page can read why
    other = open_stack.http.options(PATH, headers={**ASKS, "origin": "https://other.example"})
    assert (other.status_code, other.headers.get(ALLOWED)) == (400, None)
