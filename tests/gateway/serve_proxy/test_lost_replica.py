"""What clients get when the replica that has their request dies."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from gateway.serve_proxy.request_id_guard import RequestIdGuard
from gateway.serve_proxy.unserved_guard import UnservedGuard
from tests.gateway.serve_proxy.test_no_application import PLAIN, answer
from tests.gateway.stack import start_http

ERROR = {
    "message": "the gateway that had this request is lost: send it again",
    "type": "service_unavailable",
    "param": None,
    "code": "not_ready",
}


class DyingProxy:
    """Sends some messages and returns, as Serve's proxy whose replica has died."""

    def __init__(self, messages: list[Message]) -> None:
        self._messages = messages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        for message in self._messages:
            await send(message)


def ask(messages: list[Message], path: str = "/v1/completions") -> list[Message]:
    """What a client of the guarded proxy gets."""
    sent: list[Message] = []

    async def take(message: Message) -> None:
        sent.append(message)

    async def nothing() -> Message:
        raise AssertionError("nobody reads the body")

    headers = [(b"x-request-id", b"mine")]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    asyncio.run(UnservedGuard(DyingProxy(messages))(scope, nothing, take))
    return sent


@pytest.mark.parametrize("messages", [[], answer(503, PLAIN, b"unavailable", b"")])
def test_without_an_answer_the_client_may_send_again(messages: list[Message]) -> None:
    start, body = ask(messages)
    headers = Headers(scope=start)
    assert start["status"] == 503
    assert json.loads(body["body"]) == {"error": ERROR}
    assert headers["content-type"] == "application/json"
    assert headers["content-length"] == str(len(body["body"]))
    assert headers["retry-after"] == "1"
    assert headers.getlist("x-request-id") == ["mine"]
    assert not body.get("more_body", False)


def test_a_stream_that_has_begun_ends_with_the_error() -> None:
    begun = answer(200, "text/event-stream; charset=utf-8", b"data: 1\n\n", b"data: 2\n\n")[:2]
    sent = ask(begun)
    assert sent[:2] == begun
    (last,) = sent[2:]
    assert not last.get("more_body", False)
    event, done = last["body"].decode().removesuffix("\n\n").split("\n\n")
    assert json.loads(event.removeprefix("data: ")) == {"error": ERROR}
    assert done == "data: [DONE]"


@pytest.mark.parametrize(
    ("messages", "path"),
    [
        (answer(200, "text/event-stream", b"data: 1", b""), "/v1/completions"),
        (answer(503, "application/json", b"{}"), "/v1/completions"),
        (answer(200, "application/json", b"{", b"}")[:2], "/v1/completions"),  # cut
        (answer(503, PLAIN, b"Route table is not populated yet."), "/-/routes"),
        ([], "/-/routes"),
    ],
)
def test_other_answers_pass_as_they_are(messages: list[Message], path: str) -> None:
    assert ask(messages, path) == messages


def test_over_http_it_is_an_answer_like_every_other() -> None:
    async def work() -> httpx.Response:
        url, stop = await start_http(RequestIdGuard(UnservedGuard(DyingProxy([]))))
        async with httpx.AsyncClient(base_url=url) as client:
            response = await client.post("/v1/completions", json={"prompt": "x"})
        await stop()
        return response

    response = asyncio.run(work())
    assert (response.status_code, response.json()) == (503, {"error": ERROR})
    assert len(response.headers["x-request-id"]) == 32
