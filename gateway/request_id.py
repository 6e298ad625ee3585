"""Names of requests: the client's own where it is fit. Also used inside Serve's proxy."""

from __future__ import annotations

import re
import uuid
from contextvars import ContextVar

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.errors import RequestError
from gateway.absent_app import AbsentAppGuard
from gateway.early_answers import EarlyAnswerGuard
from gateway.freed_memory import start_returning
from gateway.http_protocol import bound_headers
from gateway.tls import demand_client_certificates

HEADER = "x-request-id"
"""Where a request's name travels, both ways."""
REQUEST_ID: ContextVar[str] = ContextVar("REQUEST_ID", default="")
"""Name of the request that the running task serves; empty outside of one."""
PROXY_CALLBACK = "gateway.request_id.proxy_middlewares"
"""For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, set before Ray is started: Serve's proxy then
takes our guards in."""
_FIT = re.compile(r"[A-Za-z0-9._-]{1,128}")


def choose_request_id(wanted: str | None) -> str:
    """The client's own id where it is fit, else a new one."""
    if wanted and _FIT.fullmatch(wanted):
        return wanted
    return uuid.uuid4().hex


def check_request_id(wanted: str) -> str:
    """The field ``request_id`` as it is. Raises ``RequestError`` if it is not fit."""
    if not _FIT.fullmatch(wanted):
        rule = "must be 1 to 128 letters, digits, ., _ or -"
        raise RequestError(f"request_id ({wanted[:32]!r}) {rule}", "request_id")
    return wanted


class RequestIdGuard:
    """ASGI middleware for Serve's proxy, which answers with whatever id comes in: make it fit."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event."""
        if scope["type"] == "http":
            headers = MutableHeaders(scope=scope)
            headers[HEADER] = choose_request_id(headers.get(HEADER))
        await self._app(scope, receive, send)


def proxy_middlewares() -> list[Middleware]:
    """What ``PROXY_CALLBACK`` names."""
    demand_client_certificates()
    bound_headers()
    start_returning()
    inside_out = (AbsentAppGuard, EarlyAnswerGuard, RequestIdGuard)
    return [Middleware(guard) for guard in inside_out]
