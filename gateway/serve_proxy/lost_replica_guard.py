"""An error object for answers that Serve's proxy leaves unfinished, since their replica has died.

Without an answer from the application uvicorn makes one of its own: 500 in plain text. A stream
that has begun is cut. Nothing of the request runs any more, so that sending it again is safe.

Upstream: the proxy answers in place of a replica for 408, 429 and 503 only (in plain text), see
``send_http_response_on_exception``. No issue known.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable
from enum import Enum, auto

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.core.errors import NotReadyError
from gateway.core.errors import ErrorReport, report_error
from gateway.core.request_id import HEADER

_OWN_PATHS = "/-/"
"""Prefix of the proxy's own paths."""


class LostReplicaGuard:
    """ASGI middleware for Serve's proxy: 503 ``not_ready``, or an event at the end of a stream."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or path.startswith(_OWN_PATHS):
            await self._app(scope, receive, send)
            return
        answer = _Answer(send, Headers(scope=scope).get(HEADER, ""))
        await self._app(scope, receive, answer.forward)
        await answer.end()


class _State(Enum):
    AWAITED = auto()
    BEGUN = auto()
    STREAMING = auto()
    """Events are sent."""
    ENDED = auto()
    REPLACED = auto()


class _Answer:
    """The answer to one request."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self._state = _State.AWAITED

    def forward(self, message: Message) -> Awaitable[None]:  # no coroutine: once for every token
        if self._state is _State.REPLACED:
            return _drop()
        if message["type"] == "http.response.start":
            kind = Headers(scope=message).get("content-type", "")
            if message["status"] == 503 and kind.startswith("text/plain"):
                self._state = _State.REPLACED
                return self._refuse()
            is_stream = kind.startswith("text/event-stream")
            self._state = _State.STREAMING if is_stream else _State.BEGUN
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self._state = _State.ENDED
        return self._send(message)

    async def end(self) -> None:
        """The application has returned."""
        if self._state is _State.AWAITED:
            await self._refuse()
        elif self._state is _State.STREAMING:
            event = b"data: " + _content(_lost()) + b"\n\ndata: [DONE]\n\n"
            await self._send({"type": "http.response.body", "body": event})

    async def _refuse(self) -> None:
        report = _lost()
        content = _content(report)
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


def _lost() -> ErrorReport:
    return report_error(NotReadyError("the gateway that had this request is lost: send it again"))


def _content(report: ErrorReport) -> bytes:
    return json.dumps(report.body(), separators=(",", ":")).encode()


async def _drop() -> None:
    """Drop the rest of an answer that was replaced."""
