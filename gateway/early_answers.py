"""Answers that come before a body. Used inside Serve's proxy.

A client that says ``Expect: 100-continue`` sends its body when it is told to. Serve's proxy asks
for every body at once, which tells it to, even where the application refuses for the length alone.
"""

from __future__ import annotations

import asyncio
import contextlib

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.gateway_config import MAX_BODY_BYTES

_HOLD_S = 1.0
"""Time that the application has to refuse; curl waits as long before it sends its body anyway."""


def waits_to_send(headers: Headers) -> bool:
    """Whether the client sends its body only when it is told to."""
    return headers.get("expect", "").lower() == "100-continue"


class EarlyAnswerGuard:
    """ASGI middleware for Serve's proxy: waiting clients with long bodies get a refusal at once.

    Only lengths above the usual limit are held back. Where the limit is higher, a body that is
    taken begins ``_HOLD_S`` later; where it is lower, the client sends a body that is not taken.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event."""
        if scope["type"] == "http" and _is_held(Headers(scope=scope)):
            held = _HeldBody(receive, send)
            receive, send = held.receive, held.send
        await self._app(scope, receive, send)


class _HeldBody:
    """One request, whose body is asked for late or never."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._is_asked = False
        self._started = asyncio.Event()

    async def receive(self) -> Message:
        """The next part of the body, or that the client has gone."""
        if not self._is_asked:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_HOLD_S):
                    await self._started.wait()
        self._is_asked = True
        return await self._receive()

    async def send(self, message: Message) -> None:
        """A part of the answer."""
        if message["type"] == "http.response.start":
            if not self._is_asked:  # its body may follow or not: nothing can come after it
                MutableHeaders(scope=message)["connection"] = "close"
            self._started.set()
        await self._send(message)


def _is_held(headers: Headers) -> bool:
    length = headers.get("content-length", "")
    return waits_to_send(headers) and length.isdecimal() and int(length) > MAX_BODY_BYTES
