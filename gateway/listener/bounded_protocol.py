"""uvicorn's HTTP protocol with the gateway's error object and three limits: for request line and
headers, for response data that the client does not read, and for pipelined requests.

Without the first limit, a client without a key could fill the server's memory with endless headers
(CVE-2025-48956 in vLLM), or with endless trailers after a chunked body. Without the last limit, a
client could send requests faster than they are served, as uvicorn resumes reading after each
response.

It also ignores offers to upgrade, such as ``h2c`` of Java's client; uvicorn would lose the body of
such a request (Kludex/uvicorn#2722).

Upstream: Kludex/uvicorn#157 and #1684, both closed. uvicorn limits headers only with h11, which is
slower than httptools.
"""

from __future__ import annotations

import asyncio
import json
import socket
import uuid
from collections.abc import Sized

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from cluster.core.errors import ExpertMeshError, RequestError, RequestTooLargeError
from gateway.core.errors import report_error

MAX_HEAD_BYTES = 16 * 1024
"""Maximum size of request line and headers together, and of the trailers after a body."""
MAX_HEADERS = 256
MAX_WAITING = 256
"""Maximum number of pipelined requests of a connection that wait for earlier responses."""
STALL_LIMIT_S = 300.0
"""Seconds within which a client must read about 100 KiB of a waiting response."""
_UPGRADE = b"upgrade"
_UNSENT_BYTES = 64 * 1024
"""Bytes that the kernel buffers beyond the client's receive window. By default it buffers 4 MiB and
accepts more only after the client has read 1 MiB, so that a slow client would seem stalled."""


class _Flow(FlowControl):
    """Pauses reading while pipelined requests wait for earlier responses."""

    def __init__(self, transport: asyncio.Transport, waiting: Sized) -> None:
        super().__init__(transport)
        self._waiting = waiting

    def resume_reading(self) -> None:
        if not self._waiting:
            super().resume_reading()


class BoundedHttpProtocol(HttpToolsProtocol):
    _is_in_head = True
    _num_unread = 0
    _num_head_bytes = 0
    _is_refused = False
    _refusal = b""
    """Refusal that is not sent yet: it follows the responses to earlier requests."""
    _stalled: asyncio.TimerHandle | None = None
    _running: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport, self.pipeline)
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        # asyncio sets this for sockets of its own only; without it a body waits until the client
        # acknowledges the headers, up to 40 ms.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self._num_unread += len(data)
        self._unset_keepalive_if_required()
        self._parse(data)
        if self._is_refused or self._num_unread <= MAX_HEAD_BYTES:
            return
        if self._is_in_head:
            self._reject_headers()
        else:  # endless trailers or chunk extensions, perhaps after the start of the response
            self.transport.abort()

    def _parse(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as err:
                if self._is_refused or not self._offers_upgrade():  # CONNECT, which gets a response
                    return
                data = self._head_without_upgrade() + data[err.args[0] :]
                continue
            except httptools.HttpParserError:
                self.logger.warning("Invalid HTTP request received.")  # as uvicorn
                self.send_400_response("")
            return

    def _head_without_upgrade(self) -> bytes:
        """Return the head of the current request without ``Upgrade``, for a new parser.

        The parser takes what follows an upgrade for another protocol, so that the body is lost.
        """
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        kept = (b"%b: %b" % pair for pair in self.headers if pair[0] != _UPGRADE)
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return b"\r\n".join((b"%b %b HTTP/%b" % (method, self.url, version), *kept, b"", b""))

    def _offers_upgrade(self) -> bool:
        return self.parser.should_upgrade() and any(name == _UPGRADE for name, _ in self.headers)

    def on_message_begin(self) -> None:
        self._is_in_head, self._num_head_bytes, self._num_unread = True, 0, 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._num_head_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:  # uvicorn would add the trailers of a body to the headers
            self._num_head_bytes += len(name) + len(value)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_refused or self._offers_upgrade():  # an offer is parsed again without it
            return
        self._is_in_head, self._num_unread = False, 0
        if self._num_head_bytes > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            self._reject_headers()
            return
        if len(self.pipeline) >= MAX_WAITING:
            rule = f"at most {MAX_WAITING} requests may wait for earlier responses"
            self._respond(b"400 Bad Request", RequestError(rule))
            raise ConnectionAbortedError(rule)  # stops the parser
        super().on_headers_complete()
        if self.expect_100_continue:  # it is unknown whether the body of a rejected request follows
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._num_unread = 0
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not (self._is_refused or self._offers_upgrade()):
            super().on_message_complete()
            self._is_in_head = True

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.flow.resume_reading()  # the last waiting request has begun
        self._send_refusal()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(STALL_LIMIT_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_timer()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)  # notifies the last request, which may still wait
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        self._stop_timer()

    def _stop_timer(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()

    def send_400_response(self, msg: str) -> None:
        """Respond to bytes that are not HTTP."""
        if not self._is_refused:
            self._respond(b"400 Bad Request", RequestError("the request is not valid HTTP"))

    def _reject_headers(self) -> None:
        if self._is_refused or self.transport.is_closing():
            return
        limits = f"{MAX_HEAD_BYTES} bytes, {MAX_HEADERS} lines"
        error = RequestTooLargeError(f"the headers are above the limit of {limits}")
        self._respond(b"431 Request Header Fields Too Large", error)

    def _respond(self, status: bytes, error: ExpertMeshError) -> None:
        """Respond in place of the application, after earlier requests, and close the connection.

        If the response to the request is being sent, as its body is not valid, it gets no other.
        """
        self._is_refused = True
        if self.pipeline and self.cycle.more_body:
            self.pipeline.popleft()  # this request, which has not begun
            self.flow.resume_reading()
        content = json.dumps(report_error(error).body()).encode()
        lines = (
            b"HTTP/1.1 " + status,
            b"content-type: application/json",
            b"connection: close",
            b"x-request-id: " + uuid.uuid4().hex.encode(),
            b"content-length: " + str(len(content)).encode(),
            b"",
            content,
        )
        self._refusal = b"\r\n".join(lines)
        self._send_refusal()

    @property
    def _is_owed(self) -> bool:
        """Whether whole requests wait for a response, or for its end."""
        running = self._running
        if self.pipeline or running is None or running.response_complete:
            return bool(self.pipeline)
        return running is not self.cycle or not running.more_body

    def _send_refusal(self) -> None:
        if not self._refusal or self._is_owed or self.transport.is_closing():
            return
        running = self._running
        if running is None or running.response_complete or not running.response_started:
            self.transport.write(self._refusal)
        self._refusal = b""
        self.transport.close()
