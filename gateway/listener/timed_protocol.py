"""``BoundedHttpProtocol`` with time limits and a limit on connections.

uvicorn closes only connections that are idle after a response, and each byte stops its timer. It
waits indefinitely for a first request, for the rest of the headers, and for a body that the
application does not read.
"""

from __future__ import annotations

import asyncio

from cluster.core.errors import DeadlineExceededError
from gateway.listener.bounded_protocol import BoundedHttpProtocol

HEAD_LIMIT_S = 10.0
"""Seconds for request line and headers, from their first byte or the start of the connection."""
BODY_LIMIT_S = 30.0
"""Seconds in which a body must grow by ``BODY_STEP_BYTES`` while it is read. Also the seconds for
the rest of a body after its response, as an application may respond before it has read a body."""
BODY_STEP_BYTES = 16 * 1024
IDLE_LIMIT_S = 75.0
"""Longest idle time in seconds of a connection between two requests."""
_FLUSH_LIMIT_S = 5.0
"""Seconds for a client to read the timeout response."""


class TimedHttpProtocol(BoundedHttpProtocol):
    """Closes a connection whose client does not send or read in time."""

    max_connections = 256
    """Maximum connections of the server; a further one ends the connection idle for longest."""
    idle: dict[TimedHttpProtocol, None]
    """All idle connections of the server (see ``is_idle``), the longest idle first. Shared by all
    connections, and set by ``HttpListener``."""
    _timer: asyncio.TimerHandle | None = None
    _is_between_requests = False
    _has_begun_head = False
    _has_whole_request = False
    _num_new_bytes = 0
    """Bytes of the body that arrived since the timer was set."""

    @property
    def is_serving(self) -> bool:
        """Whether the application serves a request."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def is_idle(self) -> bool:
        """Whether the connection may be ended for a new one: it has sent no whole request, does not
        read its response, or has sent pipelined requests.
        """
        has_request = self.is_serving and self._has_whole_request
        return not has_request or self.flow.write_paused or bool(self.pipeline)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait(HEAD_LIMIT_S)
        self.idle[self] = None
        if len(self.connections) > self.max_connections:
            self._end_longest_idle()

    def _end_longest_idle(self) -> None:
        """End the connection that is idle for longest, perhaps this one. It leaves the server's
        connections at once, as its socket is closed."""
        oldest = next(iter(self.idle))
        del self.idle[oldest]
        self.connections.discard(oldest)
        oldest.transport.abort()

    def _update_idle(self) -> None:
        if self.is_idle and self in self.connections:
            self.idle.setdefault(self)
        else:
            self.idle.pop(self, None)

    def data_received(self, data: bytes) -> None:
        if self._is_between_requests:
            self._is_between_requests = False
            self._wait(HEAD_LIMIT_S)
        super().data_received(data)
        self._update_idle()

    def on_message_begin(self) -> None:
        self._has_begun_head, self._has_whole_request = True, False
        if self._timer is None:  # the request arrived before the previous response ended
            self._wait(HEAD_LIMIT_S)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._has_begun_head = False
        self._wait(BODY_LIMIT_S)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_new_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._has_whole_request = True
        self._stop_waiting()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unset_keepalive_if_required()  # uvicorn's own timer
        if self._has_whole_request and not self.is_serving:  # no pipelined request has begun
            self._is_between_requests = True
            self._wait(IDLE_LIMIT_S)
        self._update_idle()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._update_idle()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._update_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_waiting()
        self._update_idle()

    def _wait(self, limit_s: float) -> None:
        self._stop_waiting()
        self._num_new_bytes = 0
        self._timer = self.loop.call_later(limit_s, self._end)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        """End the connection, unless its body grew by ``BODY_STEP_BYTES``, reading is paused, or
        responses precede a refusal."""
        self._timer = None
        is_in_body = self.is_serving and not self._has_begun_head
        is_growing = is_in_body and self._num_new_bytes >= BODY_STEP_BYTES
        if self.flow.read_paused or is_growing or (self._is_refused and self._is_owed):
            self._wait(BODY_LIMIT_S if is_in_body else HEAD_LIMIT_S)
            return
        if self._is_refused or not self._has_begun_head:
            self.transport.abort()
            return
        error = DeadlineExceededError(f"the headers did not arrive within {HEAD_LIMIT_S:g} s")
        self._respond(b"408 Request Timeout", error)
        self._timer = self.loop.call_later(_FLUSH_LIMIT_S, self._end)
