"""Refusals of a full queue, repeated by Serve's proxy for a moment (``gateway.core.echoes``).

A refusal that goes through the proxy and a replica costs both about as much time as ten tokens of a
stream; at ten times the sustainable rate that would take most of two cores from the workers.
Upstream: Serve's own limit, ``max_queued_requests``, knows neither keys nor retry times.

    refused                holds: until the replica expects the next request to leave
    for _PACED_S then      one request passes for each half of that time, the others are refused
    then, or never refused all pass

The pace bounds the work of the replica when its answers come late: if all passed until the next
refusal has come, a replica that is a second behind would get a second's requests, and stay behind.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.core.echoes import ECHOES, HOLDS
from gateway.core.headers import PRIORITY_HEADER
from gateway.core.request_id import HEADER

_MAX_KNOWN = 1024
"""Refusals that are kept; those that no longer matter are not counted."""
_PACED_S = 1.0
"""Time after a refusal has ceased to hold in which requests pass one by one."""
_WHOSE = (
    "authorization",
    "api-key",
    "x-api-key",
    PRIORITY_HEADER,
    "content-type",
    "content-encoding",
    "origin",  # the answer names it
)
"""Headers that decide with the path whether a request is refused like another one."""

_Whose = tuple[str | None, ...]


@dataclass(slots=True)
class _Refusal:
    """An answer, and until when it holds."""

    until_s: float
    pace_s: float
    """Time between two requests that pass later."""
    reason: str
    start: Message
    body: bytes = b""
    is_whole: bool = False
    passed_s: float = -math.inf
    """Time at which the last request has passed."""

    def repeats(self, now_s: float) -> bool:
        """Whether a request is refused, too; else it counts as one that passes."""
        if now_s < self.until_s or now_s < min(self.passed_s + self.pace_s, self.forgotten_s):
            return True
        self.passed_s = now_s
        return False

    @property
    def forgotten_s(self) -> float:
        """Time from which all pass."""
        return self.until_s + _PACED_S


class RefusalEcho:
    """ASGI middleware for Serve's proxy.

    Args:
        app: the proxy.
        clock: monotonic seconds.
    """

    def __init__(self, app: ASGIApp, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._clock = clock
        self._known: dict[_Whose, _Refusal] = {}
        self._untold: Counter[tuple[str, str]] = Counter()  # by path and reason

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        whose = (scope["method"], scope["path"], *(headers.get(name) for name in _WHOSE))
        refusal = self._known.get(whose)
        if refusal is not None and refusal.is_whole and self._clock() < refusal.forgotten_s:
            first = await receive()
            if _is_like_others(first) and refusal.repeats(self._clock()):
                await self._repeat(refusal, scope["path"], headers.get(HEADER, ""), send)
                return
            receive = _again(first, receive)
        await self._app(self._told(scope), receive, self._watch(whose, send))

    async def _repeat(self, refusal: _Refusal, path: str, request_id: str, send: Send) -> None:
        self._untold[path, refusal.reason] += 1
        start = {**refusal.start, "headers": list(refusal.start["headers"])}
        MutableHeaders(scope=start)[HEADER] = request_id
        await send(start)
        await send({"type": "http.response.body", "body": refusal.body})

    def _told(self, scope: Scope) -> Scope:
        told = [(*kind, number) for kind, number in self._untold.items()]
        self._untold.clear()
        return {**scope, "extensions": {**scope.get("extensions", {}), ECHOES: told}}

    def _watch(self, whose: _Whose, send: Send) -> Send:
        """``send`` that keeps a refusal which holds for a while."""
        refusal: _Refusal | None = None

        async def forward(message: Message) -> None:
            nonlocal refusal
            if message["type"] == "http.response.start" and message["status"] == 429:
                headers = MutableHeaders(scope=message)
                if (holds := headers.get(HOLDS)) is not None:
                    del headers[HOLDS]
                    holds_ms, reason = holds.split()
                    holds_s = int(holds_ms) / 1000
                    until_s = self._clock() + holds_s
                    refusal = _Refusal(until_s, holds_s / 2, reason, dict(message))
                    self._keep(whose, refusal)
            elif refusal is not None:
                refusal.body += message.get("body", b"")
                refusal.is_whole = not message.get("more_body", False)
            await send(message)

        return forward

    def _keep(self, whose: _Whose, refusal: _Refusal) -> None:
        now = self._clock()
        self._known = {w: known for w, known in self._known.items() if now < known.forgotten_s}
        if len(self._known) < _MAX_KNOWN:
            self._known[whose] = refusal


def _is_like_others(message: Message) -> bool:
    """A whole body that names no priority: one above 0 may wait for longer."""
    is_whole = message["type"] == "http.request" and not message.get("more_body", False)
    return is_whole and b"priority" not in message.get("body", b"")


def _again(first: Message, receive: Receive) -> Receive:
    """``receive`` that begins with a message that was taken."""
    taken: list[Message] = [first]

    async def next_message() -> Message:
        return taken.pop() if taken else await receive()

    return next_message
