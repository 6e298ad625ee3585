"""The steps of every HTTP request, whatever its route.

``HttpMiddleware`` gives each request an id, checks its key, counts it, and turns every exception
into the error object. ``read_json`` reads bodies within their limits; ``run_until_gone`` ends work
whose client has left.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.core.errors import (
    DeadlineExceededError,
    QueueFullError,
    RequestError,
    RequestTooLargeError,
    UnsupportedParameterError,
)
from gateway.auth.auth import CALLER, KeyRing
from gateway.auth.key_limits import KeyUsage
from gateway.core.echoes import ECHOES, HOLDS
from gateway.core.errors import ClientGoneError
from gateway.core.expect import waits_to_send
from gateway.core.protocols import error_body, is_messages
from gateway.core.receipts import RECEIPT, RECEIPTS, WINDOW_BYTES
from gateway.core.request_id import HEADER, REQUEST_ID, choose_request_id
from gateway.core.tuning import GatewayTuning
from gateway.generation.gateway import Gateway
from gateway.generation.request_log import RequestLog
from gateway.generation.request_trace import CLIENT_GONE
from gateway.http.parse import parse_json

OPEN_PATHS = frozenset({"/health", "/ready", "/v2/health/live", "/v2/health/ready"})
MAX_TIMEOUT_MS = 99_999_999_999
"""Longest time that a client can ask for; the server's own limit is shorter."""
_METHODS = frozenset(
    {"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"}
)
"""Counted by name; any other counts as ``other``. Source: RFC 9110, section 9; RFC 5789."""
_DRAIN_FACTOR = 8
"""A body above the limit is read up to this many times the limit, so that its sender can see the
answer, and is cut off beyond."""
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_PIECE = 4096
"""Entries of a long list that are written at a time."""
_JOINED = 1024
"""Pieces of a long answer that are joined, and freed, at a time."""
Parsed = TypeVar("Parsed")
"""What an endpoint reads in a body."""


class Responder:
    """Sends one response, and knows how far it has got.

    Behind a proxy that sends receipts (``gateway.core.receipts``) a stream waits for its client;
    elsewhere the server's ``send`` does.
    """

    def __init__(self, scope: Scope, send: Send, receive: Receive) -> None:
        self._send = send
        self._receive = receive
        self._has_receipts = RECEIPTS in scope.get("extensions", {})
        self._num_unread = 0
        self._has_room = asyncio.Event()
        self.is_watched = False  # by a reader of receipts
        self.is_started = False
        self.is_complete = False
        self.status = 0
        """HTTP status; 0 before the start."""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.is_started = True
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            content, is_last = message.get("body", b""), not message.get("more_body", False)
            if is_last and not self.is_watched and len(content) > WINDOW_BYTES:
                await run_until_gone(self._receive, self, self._pieces(content))
                return
            self.is_complete = is_last
        await self._send(message)

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self({"type": "http.response.start", "status": status, "headers": raw})

    async def body(self, content: bytes, more: bool = False) -> None:
        await self({"type": "http.response.body", "body": content, "more_body": more})
        self._num_unread += len(content)
        while more and self._has_receipts and self._num_unread > WINDOW_BYTES:
            self._has_room.clear()
            await self._has_room.wait()

    def take_receipt(self, num_bytes: int) -> None:
        """The client took more of the answer."""
        self._num_unread -= num_bytes
        self._has_room.set()

    async def json(
        self, content: object, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a whole JSON response; ``content`` may be bytes that are JSON already."""
        raw = content if isinstance(content, bytes) else dump_json(content)
        fixed = {"content-type": "application/json", "content-length": str(len(raw))}
        await self.start(status, {**fixed, **(headers or {})})
        await self._pieces(raw)

    async def _pieces(self, content: bytes) -> None:
        """The rest of an answer: Serve's proxy takes at most 4 MiB at a time."""
        for start in range(0, max(len(content), 1), WINDOW_BYTES):
            end = start + WINDOW_BYTES
            await self.body(content[start:end], more=end < len(content))


class RouteNames:
    """Names of routes for metrics: as many as there are routes, for any paths of clients."""

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        known = [route for route in routes if isinstance(route, Route)]
        self._fixed = frozenset(route.path for route in known if not route.param_convertors)
        self._patterns = [route for route in known if route.param_convertors]

    def of(self, path: str) -> str:
        """For example ``/v1/models/{model}``; ``other`` where there is no route."""
        if path in self._fixed:
            return path
        found = (one.path_format for one in self._patterns if one.path_regex.match(path))
        return next(found, "other")


@dataclass
class HttpMiddleware:
    """ASGI middleware around the whole application."""

    app: ASGIApp
    gateway: Gateway
    """Gives metrics and the placement epoch."""
    keys: KeyRing
    """The keys of the port."""
    routes: InitVar[Sequence[BaseRoute]]
    """Counted by path or pattern; any other path counts as ``other``."""
    adds_request_id: bool = True
    """False behind Serve, which adds the header to every answer itself."""
    open_paths: frozenset[str] = OPEN_PATHS
    """Served without a key."""

    def __post_init__(self, routes: Sequence[BaseRoute]) -> None:
        self._names = RouteNames(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = choose_request_id(headers.get(HEADER))
        scope.setdefault("state", {})["request_id"] = request_id
        REQUEST_ID.set(request_id)
        path = path_of(scope)
        responder = Responder(scope, self._with_headers(send, path, request_id), receive)
        route = self._names.of(path)
        line = RequestLog("http", route) if scope["method"] == "POST" else None
        tracing, trace = self.gateway.tracing, None
        if tracing is not None and scope["method"] == "POST":
            trace = tracing.begin(path, "http", request_id, headers.items())
        extensions = scope.get("extensions", {})
        self._count_echoes(extensions.get(ECHOES, ()), str(scope.get("root_path", "")))
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
            await self._answer_error(err, path, request_id, responder, ECHOES in extensions)
        finally:
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

    async def _answer_error(
        self, error: Exception, path: str, request_id: str, responder: Responder, is_echoed: bool
    ) -> None:
        report = self.gateway.report_error(error, request_id)
        headers = report.headers()
        is_only = self.gateway.limits.num_gateway_replicas == 1
        if is_echoed and is_only and isinstance(error, QueueFullError) and error.holds_s:
            headers[HOLDS] = f"{int(1000 * error.holds_s)} {error.limit}"
        if not responder.is_started:  # else too late: streams send their errors as events
            body = error_body(path, report, request_id)
            await responder.json(body, report.http_status, headers)

    def _count_echoes(self, echoes: Sequence[tuple[str, str, int]], root: str) -> None:
        """Count the refusals that the proxy repeated."""
        for path, reason, number in echoes:
            route = self._names.of(path.removeprefix(root) or "/")
            self.gateway.metrics.admission_rejections.labels(reason).inc(number)
            self.gateway.metrics.http_requests.labels(route, "POST", "429").inc(number)

    def _with_headers(self, send: Send, path: str, request_id: str) -> Send:
        started_s = time.monotonic()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if self.adds_request_id:
                    headers[HEADER] = request_id
                if is_messages(path):
                    headers["request-id"] = request_id
                headers["openai-processing-ms"] = str(int((time.monotonic() - started_s) * 1000))
                headers["openai-version"] = "2020-10-01"
                if self.gateway.is_leaving:
                    headers["connection"] = "close"  # so that the client changes gateways
                headers["x-expertmesh-placement-epoch"] = str(self.gateway.placement_epoch)
                if self.gateway.limits.debug_headers:
                    headers["x-expertmesh-replica"] = self.gateway.name
            await send(message)

        return send_with_headers


async def read_json(
    request: Request, gateway: Gateway, read: Callable[[dict[str, Any]], Parsed]
) -> Parsed:
    """What ``read`` makes of the object in a request's body, within the gateway's limits.

    A large body is parsed and read in a thread.

    Raises:
        RequestError: not JSON, not declared as JSON, compressed, or nested too deeply.
        RequestTooLargeError: above the limit.
        DeadlineExceededError: the client sends too slowly.
    """
    given = request.headers.get("content-type", "application/json")
    kind = given.partition(";")[0].strip()
    if not (kind.lower() == "application/json" or kind.lower().endswith("+json")):
        raise RequestError(f"content-type {kind[:64]!r} must be application/json", "content-type")
    coding = request.headers.get("content-encoding", "identity").strip()
    if coding.lower() not in ("", "identity"):
        name = "content-encoding"
        raise UnsupportedParameterError(f"{name} {coding[:64]!r} is not supported", name)
    raw = await read_body(request, gateway.limits.max_body_bytes, gateway.tuning)
    max_depth = gateway.limits.max_json_depth
    return await gateway.long_work.run(len(raw), lambda: read(parse_json(raw, max_depth)))


def timeout_header_s(request: Request) -> float | None:
    """The client's own time limit. Raises ``RequestError`` for an invalid value."""
    name = "x-request-timeout-ms"
    value = request.headers.get(name)
    if value is None:
        return None
    is_number = value.isascii() and value.isdecimal() and len(value) <= len(str(MAX_TIMEOUT_MS))
    if not (is_number and int(value) > 0):
        rule = f"must be a whole number from 1 to {MAX_TIMEOUT_MS}"
        raise RequestError(f"{name} ({value[:32]!r}) {rule}", name)
    return int(value) / 1000


@contextlib.asynccontextmanager
async def within_time(request: Request, gateway: Gateway) -> AsyncIterator[None]:
    """Cancel what takes longer than a request may. Raises ``DeadlineExceededError`` then."""
    limit_s = gateway.timeout_s(timeout_header_s(request))
    try:
        async with asyncio.timeout(limit_s):
            yield
    except TimeoutError as err:
        raise DeadlineExceededError("the request's time is over", started=True) from err


async def run_until_gone(
    receive: Receive, responder: Responder, work: Coroutine[Any, Any, None]
) -> None:
    """Run ``work`` while the client is connected.

    Raises:
        ClientGoneError: the client left; ``work`` was cancelled.
    """
    responder.is_watched = True
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_wait_gone(receive, responder))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and not responder.is_complete:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            raise ClientGoneError("the client closed the connection")
        await task
    finally:  # after a cancel nothing may be awaited here: both end by themselves
        watch.cancel()
        task.cancel()


class WatchedEndpoint(ABC, Generic[Parsed]):
    """A POST route whose work ends when its client leaves, as an ASGI application."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        parsed = await read_json(request, self._gateway, lambda data: self._read(request, data))
        responder = send if isinstance(send, Responder) else Responder(scope, send, receive)
        await run_until_gone(receive, responder, self._answer(request, parsed, responder))

    @abstractmethod
    def _read(self, request: Request, data: dict[str, Any]) -> Parsed:
        """Check the object in a body; of a large body in a thread. Raises ``RequestError``."""

    @abstractmethod
    async def _answer(self, request: Request, parsed: Parsed, responder: Responder) -> None:
        """Serve what ``_read`` returned."""


def dump_json(content: object) -> bytes:
    """Compact UTF-8 JSON. Raises ``ValueError`` for NaN and infinity."""
    return _JSON.encode(content).encode()


def dump_long(content: object) -> bytes:
    """The same for an object with long lists, for threads: others run between its pieces."""
    pieces = _json_pieces(content)
    # joined as they come: a million small pieces would be freed in one go
    return b"".join(iter(lambda: b"".join(islice(pieces, _JOINED)), b""))


def _has_parts(value: object) -> bool:
    return isinstance(value, Mapping | list | tuple)


def _json_pieces(value: object) -> Iterator[bytes]:
    if isinstance(value, Mapping) and (len(value) > _PIECE or any(map(_has_parts, value.values()))):
        yield b"{"
        for place, (name, inner) in enumerate(value.items()):
            yield (b"," if place else b"") + dump_json(name) + b":"
            yield from _json_pieces(inner)
        yield b"}"
    elif isinstance(value, list | tuple) and value:
        yield b"["
        for start in range(0, len(value), _PIECE):
            piece = value[start : start + _PIECE]
            if not any(map(_has_parts, piece)):
                yield (b"," if start else b"") + dump_json(piece)[1:-1]
                continue
            for place, inner in enumerate(piece, start):
                if place:
                    yield b","
                yield from _json_pieces(inner)
        yield b"]"
    else:
        yield dump_json(value)


async def read_body(request: Request, max_bytes: int, tuning: GatewayTuning) -> bytes:
    """The body. Raises ``RequestTooLargeError``, ``DeadlineExceededError``."""
    length = request.headers.get("content-length", "")
    is_too_large = length.isdecimal() and int(length) > max_bytes
    pieces = request.stream()
    total = 0
    if not is_too_large:
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout(tuning.body_timeout_s):
                async for chunk in pieces:
                    total += len(chunk)
                    if total > max_bytes:
                        break
                    chunks.append(chunk)
                else:
                    return b"".join(chunks)
        except TimeoutError as err:
            raise DeadlineExceededError("the body did not come in time") from err
    if not (is_too_large and waits_to_send(request.headers)):
        await _drain(pieces, max_bytes * _DRAIN_FACTOR - total, tuning)
    raise RequestTooLargeError(f"the body is above the limit of {max_bytes} bytes")


async def _drain(pieces: AsyncIterator[bytes], max_bytes: int, tuning: GatewayTuning) -> None:
    """Read to the end, up to a size, or until nothing more comes."""
    now_s = asyncio.get_running_loop().time
    end_s = now_s() + tuning.body_timeout_s
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(tuning.drain_pause_s) as limit:
            async for chunk in pieces:
                max_bytes -= len(chunk)
                if max_bytes < 0:
                    return
                limit.reschedule(min(end_s, now_s() + tuning.drain_pause_s))


async def _wait_gone(receive: Receive, responder: Responder) -> None:
    while (message := await receive())["type"] != "http.disconnect":
        if message["type"] == RECEIPT:
            responder.take_receipt(message["num_bytes"])


def path_of(scope: Scope) -> str:
    """The path without the route prefix."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) or "/"
