"""What is kept of a request that is traced, until it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

from msgspec.structs import replace

from cluster.tracing.exporter import Span, SpanId
from gateway.core.call import GenerateCall
from gateway.generation.running_call import RunningCall
from workers.requests.request import Request
from workers.requests.traced import StepParents

CLIENT_GONE = "client_closed_request"
"""Error of a request whose client left."""
DEADLINE_PASSED = "deadline_exceeded"
"""Error of a request that its client gave up at its deadline."""
Port = Literal["http", "grpc"]


@dataclass(slots=True)
class RequestTrace:
    """One request: the times that its spans are made of are in its running call."""

    operation: str
    port: Port
    request_id: str
    headers: Mapping[str, Sequence[str]]
    """``traceparent`` and ``tracestate``, each with every value that came."""
    on_prompt: Callable[[RequestTrace], StepParents | None]
    """Called with each prompt that goes to an engine, in order; None: it is not sampled."""
    on_end: Callable[[RequestTrace], None]
    """Called once it is over."""
    fields: GenerateCall | None = None
    """What was asked for, once it is known to be within its limits; None for embeddings."""
    running: RunningCall | None = None
    response_id: str | None = None
    """Id of the answer, where it is not the call's."""
    error: str = ""
    """``code`` of the error in the answer; empty: none."""
    began_s: float = field(default_factory=time.monotonic)
    ended_s: float = 0.0
    day_ns: int = field(default_factory=lambda: time.time_ns() - time.monotonic_ns())
    """The time of day at 0.0 s of ``time.monotonic``."""
    span: Span | None = None
    """The request's, from its first prompt on, as workers make spans below it."""
    decodes: list[SpanId] = field(default_factory=list)
    """By prompt, the ids that the span of its decode will have."""

    def end(self, error: str = "") -> None:
        """The request is over and its call closed; ``error`` is one that has no answer.

        Its spans are made in the loop's next iteration: over gRPC the answer is still to be sent.
        """
        self.error = error or self.error
        self.ended_s = time.monotonic()
        asyncio.get_running_loop().call_soon(self.on_end, self)


TRACE: ContextVar[RequestTrace | None] = ContextVar("TRACE", default=None)
"""Trace of the request that the running task serves; None without a trace."""


def traced(request: Request) -> Request:
    """The request of a prompt, with the spans above those of its steps, if they have any."""
    trace = TRACE.get()
    parents = None if trace is None else trace.on_prompt(trace)
    return request if parents is None else replace(request, step_parents=parents)


def note_error(code: str) -> None:
    if (trace := TRACE.get()) is not None:
        trace.error = code


def note_response_id(name: str) -> None:
    """Note the id of the answer where the client chose it."""
    if (trace := TRACE.get()) is not None:
        trace.response_id = name
