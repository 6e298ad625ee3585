"""State of a traced request until its end."""

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
"""Error in the trace of a request whose client disconnected."""
DEADLINE_PASSED = "deadline_exceeded"
"""Error in the trace of a request that the client cancelled at its deadline."""
Port = Literal["http", "grpc"]


@dataclass(slots=True)
class RequestTrace:
    """State of a traced request, from which its spans are made after its end."""

    operation: str
    port: Port
    request_id: str
    headers: Mapping[str, Sequence[str]]
    """Received values of the headers ``traceparent`` and ``tracestate``, by header."""
    on_prompt: Callable[[RequestTrace], StepParents | None]
    """Function called before each prompt is sent to an engine.

    Returns the parent spans for the engine's steps; None if the steps get no spans.
    """
    on_end: Callable[[RequestTrace], None]
    """Function called after the request has ended, to make its spans."""
    fields: GenerateCall | None = None
    """The checked call of the request; None before the check, and for embeddings."""
    running: RunningCall | None = None
    model: str = ""
    """Name of the served model; empty before ``running`` is set."""
    response_id: str | None = None
    """Id of the response to the client; None if it is the id of the call."""
    error: str = ""
    """Code of the error with which the request ended; empty without an error."""
    began_s: float = field(default_factory=time.monotonic)
    ended_s: float = 0.0
    day_ns: int = field(default_factory=lambda: time.time_ns() - time.monotonic_ns())
    """Unix time in nanoseconds at which ``time.monotonic`` is 0."""
    span: Span | None = None
    """Span of the whole request; None before its first prompt is sent to an engine."""
    decodes: list[SpanId] = field(default_factory=list)
    """Ids of the prompts' decode spans in order of submission, for at most ``MAX_PROMPTS``."""

    def end(self, error: str = "") -> None:
        """End the trace, after the call of the request is closed.

        ``error`` is the code of an error that no response reports. Spans are made in the next
        iteration of the event loop; gRPC sends the response first.
        """
        self.error = error or self.error
        self.ended_s = time.monotonic()
        asyncio.get_running_loop().call_soon(self.on_end, self)


TRACE: ContextVar[RequestTrace | None] = ContextVar("TRACE", default=None)
"""Trace of the request that the current task serves; None if the request is not traced."""


def traced(request: Request) -> Request:
    """Return an engine request with the parent spans for its steps.

    Unchanged if the request that the current task serves is not traced, is not sampled, or already
    has spans for the maximum number of prompts.
    """
    trace = TRACE.get()
    parents = None if trace is None else trace.on_prompt(trace)
    return request if parents is None else replace(request, step_parents=parents)


def note_error(code: str) -> None:
    if (trace := TRACE.get()) is not None:
        trace.error = code


def note_response_id(name: str) -> None:
    """Record the id of the response, which the client chose, in the current task's trace."""
    if (trace := TRACE.get()) is not None:
        trace.response_id = name
