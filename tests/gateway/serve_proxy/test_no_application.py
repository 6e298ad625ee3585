"""What Serve's proxy says while no application is there."""

from __future__ import annotations

import asyncio
import json

import pytest
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from gateway.serve_proxy.unserved_guard import UnservedGuard

PLAIN = "text/plain; charset=utf-8"
ERROR = {
    "message": "the server is starting, or has ended",
    "type": "service_unavailable",
    "param": None,
    "code": "not_ready",
}


def answer(status: int, kind: str, *bodies: bytes) -> list[Message]:
    headers = [[b"content-type", kind.encode()], [b"x-request-id", b"mine"]]  # as Serve has them
    start = {"type": "http.response.start", "status": status, "headers": headers}
    pieces = [
        {"type": "http.response.body", "body": body, "more_body": n < len(bodies)}
        for n, body in enumerate(bodies, start=1)
    ]
    return [start, *pieces]


class FakeProxy:
    """Gives fixed answers, and notes the paths that it is asked for."""

    def __init__(self, routes: list[Message], other: list[Message]) -> None:
        self._routes = routes
        self._other = other
        self.asked: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        path = scope["path"].removeprefix(scope["root_path"])
        self.asked.append(path)
        for message in self._routes if path == "/-/routes" else self._other:
            await send(message)


def ask(proxy: FakeProxy, path: str = "/v1/completions", root: str = "") -> list[Message]:
    """What a client of the guarded proxy gets."""
    sent: list[Message] = []

    async def take(message: Message) -> None:
        sent.append(message)

    async def nothing() -> Message:
        raise AssertionError("nobody reads the body")

    scope = {"type": "http", "method": "POST", "root_path": root, "path": root + path}
    asyncio.run(
        UnservedGuard(proxy)({**scope, "headers": [(b"x-request-id", b"mine")]}, nothing, take)
    )
    return sent


def not_found() -> list[Message]:
    return answer(404, PLAIN, b"Path '/v1/completions' not found.")


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [
        (503, PLAIN, b"Route table is not populated yet."),
        (200, "application/json", b"{}"),
    ],
    ids=["at the start", "at the end"],
)
@pytest.mark.parametrize("root", ["", "/behind"])
def test_without_an_application_nothing_is_ready(
    status: int, kind: str, body: bytes, root: str
) -> None:
    proxy = FakeProxy(answer(status, kind, body), not_found())
    start, *rest = ask(proxy, root=root)
    headers = Headers(scope=start)
    content = b"".join(message["body"] for message in rest)
    assert start["status"] == 503
    assert json.loads(content) == {"error": ERROR}
    assert not rest[-1].get("more_body", False)
    assert headers["content-type"] == "application/json"
    assert headers["content-length"] == str(len(content))
    assert (headers["retry-after"], headers["retry-after-ms"]) == ("1", "1000")
    assert headers.getlist("x-request-id") == ["mine"]
    assert proxy.asked == ["/v1/completions", "/-/routes"]


def test_outside_of_all_routes_nothing_is_found() -> None:
    routes = answer(200, "application/json", b'{"/some/prefix":"expertmesh"}')
    assert ask(FakeProxy(routes, not_found())) == not_found()


@pytest.mark.parametrize(
    "messages",
    [
        answer(200, "text/event-stream; charset=utf-8", b"data: 1", b"data: 2", b""),
        answer(200, PLAIN, b"metrics"),
        answer(404, "application/json", b'{"error":{}}'),
        answer(500, PLAIN, b"failed"),
    ],
    ids=["stream", "text", "our own 404", "another status"],
)
def test_other_answers_pass_as_they_are(messages: list[Message]) -> None:
    proxy = FakeProxy(answer(200, "application/json", b"{}"), messages)
    sent = ask(proxy)
    assert len(sent) == len(messages)
    assert all(one is other for one, other in zip(sent, messages, strict=True))
    assert proxy.asked == ["/v1/completions"]


@pytest.mark.parametrize(
    "messages",
    [answer(503, PLAIN, b"Route table is not populated yet."), answer(200, PLAIN, b"{}")],
)
def test_the_proxy_s_own_paths_pass_as_they_are(messages: list[Message]) -> None:
    assert ask(FakeProxy(messages, not_found()), "/-/routes") == messages
