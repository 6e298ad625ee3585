"""503 from Serve's proxy while it knows no application.

At the beginning of a start and at the end of a stop the proxy answers every request with 404, which
neither clients nor load balancers retry.

Upstream: no issue known for the status; ray-project/ray#46938 is the same gap for a proxy that
knows the application and none of its replicas.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.core.errors import NotReadyError
from gateway.core.errors import report_error

_ROUTES_PATH = "/-/routes"
"""The proxy's list of routes: without applications an empty object, or a status but 200."""


class NotReadyGuard:
    """ASGI middleware for Serve's proxy: 503 ``not_ready`` for the 404 of a proxy without routes.

    A 404 of the application passes: it is JSON. So does the proxy's own outside of every route
    prefix, once it knows one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_answered = False

        async def start(message: Message) -> None:
            nonlocal is_answered
            if await self._knows_routes(scope, receive):
                await send(message)
                return
            is_answered = True
            await _say_not_ready(message, send)

        def forward(message: Message) -> Awaitable[None]:  # no coroutine: once for every token
            if is_answered:
                return _drop()
            if message["type"] == "http.response.start" and _is_plain_404(message):
                return start(message)
            return send(message)

        await self._app(scope, receive, forward)

    async def _knows_routes(self, scope: Scope, receive: Receive) -> bool:
        path = scope.get("root_path", "") + _ROUTES_PATH
        asked = {**scope, "method": "GET", "path": path, "raw_path": path.encode()}
        answer: list[Message] = []

        async def take(message: Message) -> None:
            answer.append(message)

        await self._app(asked, receive, take)
        start, *rest = answer
        body = b"".join(message.get("body", b"") for message in rest)
        return start["status"] == 200 and bool(json.loads(body))


def _is_plain_404(start: Message) -> bool:
    if start["status"] != 404:
        return False
    return Headers(scope=start).get("content-type", "").startswith("text/plain")


async def _say_not_ready(start: Message, send: Send) -> None:
    """The answer in place of one that begins with ``start``, whose request id it keeps."""
    report = report_error(NotReadyError("the server is starting, or has ended"))
    content = json.dumps(report.body()).encode()
    headers = MutableHeaders(scope=start)
    headers["content-type"] = "application/json"
    headers["content-length"] = str(len(content))
    headers.update(report.headers())
    await send({**start, "status": report.http_status})
    await send({"type": "http.response.body", "body": content})


async def _drop() -> None:
    """Drop the rest of an answer that was replaced."""
