"""Refusals of long bodies before they are sent."""

from __future__ import annotations

import asyncio

import pytest
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from cluster.config.gateway import MAX_BODY_BYTES
from gateway.serve_proxy.expect_continue import ExpectContinueGuard

REFUSAL: list[Message] = [
    {"type": "http.response.start", "status": 413, "headers": []},
    {"type": "http.response.body", "body": b"{}"},
]
WAITING = {"expect": "100-Continue", "content-length": str(MAX_BODY_BYTES + 1)}


class FakeProxy:
    """Asks for the body at once, as Serve's does, and refuses: before it comes, or after."""

    def __init__(self, refuses_first: bool) -> None:
        self._refuses_first = refuses_first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        body = asyncio.ensure_future(receive())
        await (asyncio.sleep(0) if self._refuses_first else body)
        for message in REFUSAL:
            await send({**message})
        body.cancel()


def ask(
    headers: dict[str, str], refuses_first: bool = True, hold_s: float = 3600.0
) -> tuple[bool, Headers]:
    """Whether the client is asked for its body, and the headers that it gets."""
    asked: list[bool] = []
    sent: list[Message] = []

    async def receive() -> Message:
        asked.append(not sent)
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    guard = ExpectContinueGuard(FakeProxy(refuses_first), hold_s)
    asyncio.run(guard({"type": "http", "headers": raw}, receive, send))
    assert [message["type"] for message in sent] == [message["type"] for message in REFUSAL]
    return any(asked), Headers(scope=sent[0])


def test_a_refused_client_that_waits_is_not_asked_to_send() -> None:
    is_asked, headers = ask(WAITING)
    assert not is_asked
    assert headers["connection"] == "close"


def test_a_client_that_waits_is_asked_to_send_after_a_while() -> None:
    is_asked, headers = ask(WAITING, refuses_first=False, hold_s=0.01)
    assert is_asked
    assert "connection" not in headers


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-length": str(MAX_BODY_BYTES + 1)},
        {**WAITING, "content-length": str(MAX_BODY_BYTES)},
        {"expect": "100-continue", "transfer-encoding": "chunked"},
    ],
    ids=["none", "does not wait", "not long", "no length"],
)
def test_other_bodies_are_asked_for_at_once(headers: dict[str, str]) -> None:
    assert ask(headers, refuses_first=False)[0]
