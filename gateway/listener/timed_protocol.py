"""``BoundedHttpProtocol`` with limits of time and of connections.

uvicorn closes a connection that is idle after a response. It waits indefinitely for a first
request, for the rest of a head, and for a body that is not read: each byte stops its timer.
"""

from __future__ import annotations

import asyncio

from cluster.core.errors import DeadlineExceededError
from gateway.listener.bounded_protocol import BoundedHttpProtocol

HEAD_LIMIT_S = 10.0
"""Time for request line and headers, from the first byte or from a new connection on."""
BODY_LIMIT_S = 30.0
"""Time within which a body that is being read must grow by ``BODY_STEP_BYTES``, and time for the
rest of a body after its response. An application that reads the body may respond earlier."""
BODY_STEP_BYTES = 16 * 1024
IDLE_LIMIT_S = 75.0
"""Longest time that a connection is idle between two requests."""
_FLUSH_LIMIT_S = 5.0
"""Time for a client to read the timeout response."""


class TimedHttpProtocol(BoundedHttpProtocol):
    """Closes a connection that has waited too long for its client."""

    max_connections = 256
    """Most connections of the server; a further one ends the oldest idle connection."""
    _timer: asyncio.TimerHandle | None = None
    _is_between_requests = False
    _has_begun_head = False
    _has_whole_request = False
    _num_new_bytes = 0
    """Bytes of the body since the timer was set."""
    since_s = 0.0
    """Time at which the connection was made, on the loop's clock."""

    @property
    def is_serving(self) -> bool:
        """Whether an application is working on a request."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def is_idle(self) -> bool:
        """Whether no client waits for a response: there is no whole request, the client does not
        read the response, or it has sent pipelined requests.
        """
        has_request = self.is_serving and self._has_whole_request
        return not has_request or self.flow.write_paused or bool(self.pipeline)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.since_s = self.loop.time()
        self._wait(HEAD_LIMIT_S)
        if len(self.connections) > self.max_connections:
            self._end_oldest_idle()

    def _end_oldest_idle(self) -> None:
        """End the oldest idle connection, or this one if none is idle."""
        protocols = (one for one in self.connections if isinstance(one, TimedHttpProtocol))
        open_ones = [one for one in protocols if not one.transport.is_closing()]
        if len(open_ones) > self.max_connections:
            idle = (one for one in open_ones if one.is_idle)
            min(idle, key=lambda one: one.since_s, default=self).transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._is_between_requests:
            self._is_between_requests = False
            self._wait(HEAD_LIMIT_S)
        super().data_received(data)

    def on_message_begin(self) -> None:
        self._has_begun_head, self._has_whole_request = True, False
        if self._timer is None:  # the next request precedes the previous response
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
        if self._has_whole_request and not self.pipeline:
            self._is_between_requests = True
            self._wait(IDLE_LIMIT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_waiting()

    def _wait(self, limit_s: float) -> None:
        self._stop_waiting()
        self._num_new_bytes = 0
        self._timer = self.loop.call_later(limit_s, self._end)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        """End the connection after a timeout."""
        self._timer = None
        is_in_body = self.is_serving and not self._has_begun_head
        if is_in_body and (self.flow.read_paused or self._num_new_bytes >= BODY_STEP_BYTES):
            self._wait(BODY_LIMIT_S)
            return
        if self.is_serving or not self._has_begun_head:
            self.transport.abort()
            return
        error = DeadlineExceededError(f"the headers did not arrive within {HEAD_LIMIT_S:g} s")
        self._respond(b"408 Request Timeout", error)
        self._timer = self.loop.call_later(_FLUSH_LIMIT_S, self.transport.abort)
