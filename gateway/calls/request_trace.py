"""State of a traced request until it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

from msgspec.structs import replace

from cluster.tracing.exporter import Span, SpanId
from gateway.calls.running_call import RunningCall
from gateway.core.call import GenerateCall
from workers.requests.request import Request
from workers.requests.traced import StepParents

CLIENT_GONE = "client_closed_request"
"""Error of a request if the client disconnected."""
DEADLINE_PASSED = "deadline_exceeded"
"""Error of a request that the client cancelled at its deadline."""
Port = Literal["http", "grpc"]


@dataclass(slots=True)
class RequestTrace:
    """A traced request. The running call has most of the times of its spans."""

    operation: str
    port: Port
    request_id: str
    headers: Mapping[str, Sequence[str]]
    """All received values of ``traceparent`` and ``tracestate``."""
    on_prompt: Callable[[RequestTrace], StepParents | None]
    """Called for each prompt before it is sent to an engine; returns None if not sampled."""
    on_end: Callable[[RequestTrace], None]
    """Called after the request has ended."""
    fields: GenerateCall | None = None
    """The checked call; None before the check, and for embeddings."""
    running: RunningCall | None = None
    response_id: str | None = None
    """Id of the response; None if it is the id of the call."""
    error: str = ""
    """``code`` of the error in the response; empty without an error."""
    began_s: float = field(default_factory=time.monotonic)
    ended_s: float = 0.0
    day_ns: int = field(default_factory=lambda: time.time_ns() - time.monotonic_ns())
    """Unix time in nanoseconds at which ``time.monotonic`` is 0."""
    span: Span | None = None
    """Span of the request; made when its first prompt is sent, as workers make child spans."""
    decodes: list[SpanId] = field(default_factory=list)
    """Span id of the decode span of each prompt."""

    def end(self, error: str = "") -> None:
        """End the trace after its call is closed. ``error`` is an error that has no response.

        Spans are made in the next iteration of the event loop; gRPC sends the response first.
        """
        self.error = error or self.error
        self.ended_s = time.monotonic()
        asyncio.get_running_loop().call_soon(self.on_end, self)


TRACE: ContextVar[RequestTrace | None] = ContextVar("TRACE", default=None)
"""Trace of the request that the current task serves; None if the request is not traced."""


def traced(request: Request) -> Request:
    """Add the parent spans of its steps to the request of a prompt if the trace is sampled."""
    trace = TRACE.get()
    parents = None if trace is None else trace.on_prompt(trace)
    return request if parents is None else replace(request, step_parents=parents)


def note_error(code: str) -> None:
    if (trace := TRACE.get()) is not None:
        trace.error = code


def note_response_id(name: str) -> None:
    """Record a response id that the client chose."""
    if (trace := TRACE.get()) is not None:
        trace.response_id = name
