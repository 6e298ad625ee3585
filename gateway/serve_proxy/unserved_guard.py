"""An error object where Serve's proxy has no application, or loses the replica of a request.

At the beginning of a start and at the end of a stop the proxy answers every request with 404, which
neither clients nor load balancers retry. Without an answer from a replica that has died, uvicorn
makes one of its own: 500 in plain text. A stream that has begun is cut. Nothing of the request
runs any more, so that sending it again is safe.

Upstream: the proxy answers in place of a replica for 408, 429 and 503 only (in plain text), see
``send_http_response_on_exception``. No issue known for either; ray-project/ray#46938 is the same
gap for a proxy that knows the application and none of its replicas.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from enum import Enum, auto

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.core.errors import NotReadyError
from gateway.core.errors import ErrorReport, report_error
from gateway.core.protocols import error_body, error_event
from gateway.core.request_id import HEADER

_OWN_PATHS = "/-/"
"""Prefix of the proxy's own paths."""
_ROUTES_PATH = "/-/routes"
"""The proxy's list of routes: without applications an empty object, or a status but 200."""
_LOST = "the gateway that had this request is lost: send it again"
_STARTING = "the server is starting, or has ended"


class UnservedGuard:
    """ASGI middleware for Serve's proxy: 503 ``not_ready``, or an event at the end of a stream.

    A 404 of the application passes: it is JSON. So does the proxy's own outside of every route
    prefix, once it knows one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or path.startswith(_OWN_PATHS):
            await self._app(scope, receive, send)
            return

        async def knows_routes() -> bool:
            path = scope.get("root_path", "") + _ROUTES_PATH
            asked = {**scope, "method": "GET", "path": path, "raw_path": path.encode()}
            found: list[Message] = []

            async def take(message: Message) -> None:
                found.append(message)

            await self._app(asked, receive, take)
            body = b"".join(message.get("body", b"") for message in found[1:])
            return found[0]["status"] == 200 and bool(json.loads(body))

        answer = _Answer(send, path, Headers(scope=scope).get(HEADER, ""), knows_routes)
        await self._app(scope, receive, answer.forward)
        await answer.end()


class _State(Enum):
    AWAITED = auto()
    PASSED = auto()
    """Nothing is to be added."""
    STREAMING = auto()
    """Events are sent."""
    REPLACED = auto()


class _Answer:
    """The answer to one request."""

    def __init__(
        self, send: Send, path: str, request_id: str, knows_routes: Callable[[], Awaitable[bool]]
    ) -> None:
        self._send = send
        self._path = path
        self._request_id = request_id
        self._knows_routes = knows_routes
        self._state = _State.AWAITED

    def forward(self, message: Message) -> Awaitable[None]:  # no coroutine: once for every token
        if self._state is _State.REPLACED:
            return _drop()
        if message["type"] == "http.response.start":
            return self._begin(message)
        if not message.get("more_body", False):
            self._state = _State.PASSED
        return self._send(message)

    async def end(self) -> None:
        """The application has returned."""
        if self._state is _State.AWAITED:
            await self._refuse(_LOST)
        elif self._state is _State.STREAMING:
            event = error_event(self._path, _report(_LOST), self._request_id)
            await self._send({"type": "http.response.body", "body": event})

    async def _begin(self, start: Message) -> None:
        kind, status = Headers(scope=start).get("content-type", ""), start["status"]
        is_own = kind.startswith("text/plain")  # answers of the application are JSON or events
        if is_own and status == 503:
            await self._refuse(_LOST)
        elif is_own and status == 404 and not await self._knows_routes():
            await self._refuse(_STARTING)
        else:
            is_stream = kind.startswith("text/event-stream")
            self._state = _State.STREAMING if is_stream else _State.PASSED
            await self._send(start)

    async def _refuse(self, message: str) -> None:
        self._state = _State.REPLACED
        report = _report(message)
        body = error_body(self._path, report, self._request_id)
        content = json.dumps(body, separators=(",", ":")).encode()
        fields = {
            "content-type": "application/json",
            "content-length": str(len(content)),
            HEADER: self._request_id,
            **report.headers(),
        }
        headers = [(name.encode(), value.encode()) for name, value in fields.items()]
        start = {"type": "http.response.start", "status": report.http_status, "headers": headers}
        await self._send(start)
        await self._send({"type": "http.response.body", "body": content})


def _report(message: str) -> ErrorReport:
    return report_error(NotReadyError(message))


async def _drop() -> None:
    """Drop the rest of an answer that was replaced."""
