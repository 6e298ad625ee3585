"""Refusals before a body: Serve's proxy reads every body at once, wanted or not.

A client with ``Expect: 100-continue`` sends its body after ``100 Continue``, which uvicorn sends
when the body is first read. So the proxy must not read a body before the application has refused
or accepted its declared length.

Upstream: Kludex/uvicorn#166 has the rule; no issue known for Serve's proxy.
"""

from __future__ import annotations

import asyncio
import contextlib

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.config.gateway import MAX_BODY_BYTES
from gateway.core.expect import waits_to_send


class ExpectContinueGuard:
    """ASGI middleware for Serve's proxy: waiting clients with long bodies get a refusal at once.

    Only lengths above the default limit are held back. Where the configured limit is higher, an
    accepted body begins ``hold_s`` later; where it is lower, the client sends a refused body.

    Args:
        app: serves the requests.
        hold_s: time to refuse; curl waits 1 s for ``100 Continue``, then sends its body anyway.
    """

    def __init__(self, app: ASGIApp, hold_s: float = 1.0) -> None:
        self._app = app
        self._hold_s = hold_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _is_held(Headers(scope=scope)):
            held = _HeldBody(receive, send, self._hold_s)
            receive, send = held.receive, held.send
        await self._app(scope, receive, send)


class _HeldBody:
    """One request, whose body is read late or never."""

    def __init__(self, receive: Receive, send: Send, hold_s: float) -> None:
        self._receive = receive
        self._send = send
        self._hold_s = hold_s
        self._is_asked = False
        self._started = asyncio.Event()

    async def receive(self) -> Message:
        """The next part of the body, or that the client has gone."""
        if not self._is_asked:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._hold_s):
                    await self._started.wait()
        self._is_asked = True
        return await self._receive()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if not self._is_asked:  # its body may follow or not: nothing can come after it
                MutableHeaders(scope=message)["connection"] = "close"
            self._started.set()
        await self._send(message)


def _is_held(headers: Headers) -> bool:
    length = headers.get("content-length", "")
    return waits_to_send(headers) and length.isdecimal() and int(length) > MAX_BODY_BYTES
