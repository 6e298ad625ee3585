"""A fit ``x-request-id``: Serve's proxy answers with any that a client sends.

Upstream: ray-project/ray#37719 made the proxy take the header as it is. No issue asks for a check.
"""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.core.request_id import HEADER, choose_request_id


class RequestIdGuard:
    """ASGI middleware for Serve's proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = MutableHeaders(scope=scope)
            headers[HEADER] = choose_request_id(headers.get(HEADER))
        await self._app(scope, receive, send)
