"""The processing that all HTTP routes share.

``HttpMiddleware`` gives each request an id, checks its key, counts it, and converts every exception
into the error object. ``run_until_disconnect`` cancels work when its client disconnects.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any, Generic

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.auth.auth import CALLER, KeyRing
from gateway.auth.key_limits import KeyUsage
from gateway.calls.gateway import Gateway
from gateway.calls.request_log import RequestLog
from gateway.calls.request_trace import CLIENT_GONE
from gateway.core.errors import ClientGoneError
from gateway.core.protocols import error_body, is_messages
from gateway.core.request_id import HEADER, REQUEST_ID, choose_request_id
from gateway.http.json_output import dump_json
from gateway.http.request_body import Parsed, read_json

PIECE_BYTES = 256 * 1024
"""Maximum bytes of a response to send at a time. The next piece waits for the client."""
UNAUTHENTICATED_PATHS = frozenset({"/health", "/ready", "/v2/health/live", "/v2/health/ready"})
_METHODS = frozenset(
    {"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"}
)
"""HTTP methods with their own label in metrics; others are counted as ``other``. Source: RFC 9110,
section 9; RFC 5789."""

_RESPONDER = "responder"
"""Key of the request's ``Responder`` in ``scope["state"]``."""


class Responder:
    """Sends one response and tracks its progress."""

    def __init__(self, send: Send, add_headers: Callable[[Message], None] | None = None) -> None:
        self._send = send
        self._add_headers = add_headers
        self.is_started = False
        self.is_complete = False
        self.is_cut_off = False
        """Whether the client disconnected before the end of the response."""
        self.status = 0
        """HTTP status; 0 before the start."""

    @classmethod
    def from_scope(cls, scope: Scope, send: Send) -> Responder:
        """Return the responder that ``HttpMiddleware`` put into the scope, or a new one."""
        shared = scope.get("state", {}).get(_RESPONDER)
        return shared if isinstance(shared, cls) else cls(send)

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if self._add_headers is not None:
                self._add_headers(message)
            self.is_started = True
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            content, is_last = message.get("body", b""), not message.get("more_body", False)
            if is_last and len(content) > PIECE_BYTES:
                await self._send_pieces(content)
                return
            self.is_complete = is_last
        await self._send(message)

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self({"type": "http.response.start", "status": status, "headers": raw})

    async def body(self, content: bytes, more: bool = False) -> None:
        message = {"type": "http.response.body", "body": content, "more_body": more}
        await (self._send(message) if more else self(message))

    async def json(
        self, content: object, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a whole JSON response; ``content`` may be bytes that are JSON already."""
        raw = content if isinstance(content, bytes) else dump_json(content)
        fixed = {"content-type": "application/json", "content-length": str(len(raw))}
        await self.start(status, {**fixed, **(headers or {})})
        await self._send_pieces(raw)

    async def _send_pieces(self, content: bytes) -> None:
        """Send the body in pieces, each after the client has read most of the earlier ones."""
        for start in range(0, max(len(content), 1), PIECE_BYTES):
            end = start + PIECE_BYTES
            await self.body(content[start:end], more=end < len(content))


class RouteNames:
    """Maps request paths to route names for metrics, so that the number of labels is bounded."""

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        http_routes = [route for route in routes if isinstance(route, Route)]
        self._fixed = frozenset(route.path for route in http_routes if not route.param_convertors)
        self._patterns = [route for route in http_routes if route.param_convertors]

    def name_of(self, path: str) -> str:
        """Return the route of a path, for example ``/v1/models/{model}``, or ``other``."""
        if path in self._fixed:
            return path
        matches = (one.path_format for one in self._patterns if one.path_regex.match(path))
        return next(matches, "other")


@dataclass
class HttpMiddleware:
    """ASGI middleware of all routes: request ids, API keys, metrics and error responses."""

    app: ASGIApp
    gateway: Gateway
    """The replica, which has the metrics and the placement epoch."""
    keys: KeyRing
    """The API keys of the port."""
    routes: InitVar[Sequence[BaseRoute]]
    """Routes that metrics count by path or pattern; any other path counts as ``other``."""
    adds_request_id: bool = True
    """Whether to add the request id to responses. False if Ray Serve's proxy adds it."""
    open_paths: frozenset[str] = UNAUTHENTICATED_PATHS
    """Paths that need no API key."""
    root_path: str = ""
    """Prefix under which a reverse proxy mounts the application; empty keeps the scope's prefix."""

    def __post_init__(self, routes: Sequence[BaseRoute]) -> None:
        self._route_names = RouteNames(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.root_path:
            scope["root_path"] = self.root_path
        headers = Headers(scope=scope)
        request_id = choose_request_id(headers.get(HEADER))
        scope.setdefault("state", {})["request_id"] = request_id
        REQUEST_ID.set(request_id)
        path = path_of(scope)
        responder = Responder(send, self._header_adder(path, request_id))
        scope["state"][_RESPONDER] = responder
        route = self._route_names.name_of(path)
        line = RequestLog("http", route) if scope["method"] == "POST" else None
        tracing, trace = self.gateway.tracing, None
        if tracing is not None and scope["method"] == "POST":
            trace = tracing.begin(path, "http", request_id, headers.items())
        status, began_s = 0, time.monotonic()
        caller: KeyUsage | None = None
        CALLER.set(None)
        try:
            if path not in self.open_paths:
                await self.keys.read_changes()
                api_key = headers.get("x-api-key") or headers.get("api-key")
                caller = self.keys.enter(headers.get("authorization"), api_key)
            await self.app(scope, receive, responder)
        except (ClientGoneError, ClientDisconnect):
            status = 499
        except asyncio.CancelledError:
            status = 499
            raise
        except Exception as err:
            await self._send_error(err, path, request_id, responder)
        finally:
            scope["state"].pop(_RESPONDER, None)  # its reference to the scope would make a cycle
            if caller is not None:
                caller.leave(time.monotonic())
            status = status or responder.status or 500
            if status == 499:
                self.gateway.metrics.client_disconnects.inc()
            method = scope["method"] if scope["method"] in _METHODS else "other"
            metrics = self.gateway.metrics
            metrics.http_requests.labels(route, method, str(status)).inc()
            metrics.http_durations.labels(route, method).observe(time.monotonic() - began_s)
            if trace is not None:
                trace.end(CLIENT_GONE if status == 499 else "")
            if line is not None:
                line.end(str(status))

    async def _send_error(
        self, error: Exception, path: str, request_id: str, responder: Responder
    ) -> None:
        report = self.gateway.report_error(error, request_id)
        if not responder.is_started:  # after the start, streams send errors as events
            body = error_body(path, report, request_id)
            await responder.json(body, report.http_status, report.headers())

    def _header_adder(self, path: str, request_id: str) -> Callable[[Message], None]:
        """Return a function that adds the headers of every response to its first message."""
        started_s = time.monotonic()

        def add_headers(message: Message) -> None:
            headers = MutableHeaders(scope=message)
            if self.adds_request_id:
                headers[HEADER] = request_id
            if is_messages(path):
                headers["request-id"] = request_id
            headers["openai-processing-ms"] = str(int((time.monotonic() - started_s) * 1000))
            headers["openai-version"] = "2020-10-01"
            if self.gateway.readiness.is_leaving:
                headers["connection"] = "close"  # the client then connects to another gateway
            epoch = self.gateway.shared.models.default.placement_epoch
            headers["x-expertmesh-placement-epoch"] = str(epoch)
            if self.gateway.limits.debug_headers:
                headers["x-expertmesh-replica"] = self.gateway.name

        return add_headers


async def run_until_disconnect(
    receive: Receive, responder: Responder, work: Coroutine[Any, Any, None]
) -> None:
    """Run ``work`` while the client is connected.

    Raises:
        ClientGoneError: the client disconnected; ``work`` was cancelled.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_wait_for_disconnect(receive, responder))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and not responder.is_complete:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            raise ClientGoneError("the client closed the connection")
        await task
        if responder.is_cut_off:  # the last messages were dropped
            raise ClientGoneError("the client closed the connection")
    finally:  # no await, as this task may be cancelled; both tasks end by themselves
        watch.cancel()
        task.cancel()
        del task  # it has the error that has this frame


class CancellableEndpoint(ABC, Generic[Parsed]):
    """ASGI application of a POST route. Its work is cancelled if the client disconnects."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        parsed = await read_json(request, self._gateway, lambda data: self._parse(request, data))
        responder = Responder.from_scope(scope, send)
        await run_until_disconnect(receive, responder, self._respond(request, parsed, responder))

    @abstractmethod
    def _parse(self, request: Request, data: dict[str, Any]) -> Parsed:
        """Convert a body's JSON object, in a thread if it is large. Raises ``RequestError``."""

    @abstractmethod
    async def _respond(self, request: Request, parsed: Parsed, responder: Responder) -> None:
        """Serve the request. ``parsed`` is the result of ``_parse``."""


async def _wait_for_disconnect(receive: Receive, responder: Responder) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    responder.is_cut_off = not responder.is_complete


def path_of(scope: Scope) -> str:
    """Return the path without the mount prefix, if a reverse proxy has not removed the prefix."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    rest = path.removeprefix(root)
    return path if rest and not rest.startswith("/") else rest or "/"
