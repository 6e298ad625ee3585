"""Traces of requests: noted while a request runs, made into spans once it is over.

An edge begins a ``RequestTrace`` and ends it; on the way ``core`` leaves the call's fields and its
``Generation`` in it. The spans are made of times that are taken anyway, so that nothing is done
for them before the first token is out. Off, there is one check for None a request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal

from cluster import spans
from cluster.config import ObservabilitySection
from cluster.spans import Exporter, Span, Value, load_exporter
from gateway.call import GenerateFields
from gateway.cluster_moments import ClusterMoments
from gateway.request_spans import Clock, Decode, EndedRequest, request_span

if TYPE_CHECKING:
    from gateway.generation import Generation

logger = logging.getLogger(__name__)

OPERATIONS: Mapping[str, str] = {
    "/v1/completions": spans.TEXT_COMPLETION,
    "/v1/chat/completions": spans.CHAT,
    "/v1/embeddings": spans.EMBEDDINGS,
    "Generate": spans.TEXT_COMPLETION,
    "GenerateStream": spans.TEXT_COMPLETION,
    "Embed": spans.EMBEDDINGS,
}
"""Paths and procedures that are traced; conversations over gRPC are chats too."""
CLIENT_GONE = "client_closed_request"
"""Error of a request whose client left."""
DEADLINE_PASSED = "deadline_exceeded"
"""Error of a request that its client gave up at its deadline."""
_HEADERS = ("traceparent", "tracestate")
_STOP_S = 1.0
"""Time for what is left at the end."""


class RequestTrace:
    """Notes on one request."""

    def __init__(
        self,
        tracing: Tracing,
        operation: str,
        port: Literal["http", "grpc"],
        request_id: str,
        headers: Mapping[str, Sequence[str]],
    ) -> None:
        self.fields: GenerateFields | None = None
        """What was asked for, once it is known to be within its limits."""
        self.generation: Generation | None = None
        """The call, once there is one."""
        self.response_id: str | None = None
        """Id of the answer, where it is not the call's."""
        self.error = ""
        """``code`` of the error that the client was told."""
        self.ended_s = 0.0
        """``time.monotonic`` of the end."""
        self.operation = operation
        self.port = port
        self.request_id = request_id
        self.headers = headers
        self.clock = Clock(day_ns=time.time_ns(), monotonic_s=time.monotonic())
        self._tracing = tracing

    def end(self, error: str = "") -> None:
        """The request is over, and its generation closed; ``error`` is what nobody was told.

        Its spans are made in the loop's next turn: over gRPC the answer is still to be sent.
        """
        self.error = error or self.error
        self.ended_s = time.monotonic()
        asyncio.get_running_loop().call_soon(self._tracing.send, self)


TRACE: ContextVar[RequestTrace | None] = ContextVar("TRACE", default=None)
"""Of the request that the running task serves, where it is traced."""


def note_error(code: str) -> None:
    """The client is told of an error."""
    if (trace := TRACE.get()) is not None:
        trace.error = code


def note_response_id(name: str) -> None:
    """The answer has an id of the client's choice."""
    if (trace := TRACE.get()) is not None:
        trace.response_id = name


class Tracing:
    """Traces the requests of one replica.

    Args:
        export: where the spans go.
        model: that is served.
        addresses: ``host:port`` of ``http`` and ``grpc``, when they are known.
        decode: None keeps prompts and outputs out.
    """

    def __init__(
        self,
        export: Exporter,
        model: str,
        addresses: Callable[[], Mapping[str, Any]],
        decode: Decode | None,
    ) -> None:
        self._export = export
        self._model = model
        self._addresses = addresses
        self._decode = decode
        self._moments = ClusterMoments()

    def begin(
        self,
        name: str,
        port: Literal["http", "grpc"],
        request_id: str,
        headers: Iterable[tuple[str, str | bytes]],
    ) -> RequestTrace | None:
        """A request to one of ``OPERATIONS``, which the running task serves; None for others."""
        operation = OPERATIONS.get(name)
        if operation is None:
            return None
        parent: dict[str, list[str]] = {}
        for header, value in headers:
            if header in _HEADERS and isinstance(value, str):
                parent.setdefault(header, []).append(value)
        trace = RequestTrace(self, operation, port, request_id, parent)
        TRACE.set(trace)
        return trace

    def see(self, snapshot: Mapping[str, Any]) -> None:
        """The cluster has changed."""
        self._moments.take(snapshot, time.monotonic())

    def send(self, trace: RequestTrace) -> None:
        """Make the spans of a request that is over. Its failure is not the request's."""
        try:
            self._export.send(self._span(trace), trace.headers)
        except Exception:
            logger.exception("request %s has no trace", trace.request_id)

    def stop(self) -> None:
        """Send what is left; blocks for a second at most."""
        self._export.stop(_STOP_S)

    def _span(self, trace: RequestTrace) -> Span:
        ended = EndedRequest(
            operation=trace.operation,
            request_id=trace.request_id,
            response_id=trace.response_id,
            model=self._model,
            server=self._server(trace.port),
            clock=trace.clock,
            ended_s=trace.ended_s,
            error=trace.error,
            fields=trace.fields,
            notes=None if trace.generation is None else trace.generation.notes(),
        )
        return request_span(ended, self._moments, self._decode)

    def _server(self, port: Literal["http", "grpc"]) -> dict[str, Value]:
        host, _, number = str(self._addresses().get(port, "")).rpartition(":")
        return {spans.SERVER_ADDRESS: host, spans.SERVER_PORT: int(number)} if host else {}


def start_tracing(
    section: ObservabilitySection,
    instance: str,
    model: str,
    addresses: Callable[[], Mapping[str, Any]],
    decode: Decode,
) -> Tracing | None:
    """What traces the requests of a replica; None where no endpoint is given.

    Raises ``ConfigError`` where the packages for it are missing.
    """
    if section.otlp_endpoint is None:
        return None
    export = load_exporter(section.otlp_endpoint)(section.otlp_endpoint, instance)
    return Tracing(export, model, addresses, decode if section.trace_content else None)
