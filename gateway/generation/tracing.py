"""Traces of requests: kept while a request runs, made into spans once it is over.

``HttpMiddleware`` and ``GrpcCall`` begin a ``RequestTrace`` and end it; ``Gateway`` adds the call's
fields and its ``Generation``. The spans are made of times that are measured anyway, and nothing is
computed for them before the first token is sent. Without tracing a request costs one check.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.config.cluster import ObservabilitySection
from cluster.tracing import names
from cluster.tracing.exporter import TraceExport, load_exporter
from gateway.cluster.events import ClusterEvents
from gateway.generation.request_spans import Decode, record_request
from gateway.generation.request_trace import TRACE, Port, RequestTrace

logger = logging.getLogger(__name__)

OPERATIONS: Mapping[str, str] = {
    "/v1/completions": names.TEXT_COMPLETION,
    "/v1/chat/completions": names.CHAT,
    "/v1/embeddings": names.EMBEDDINGS,
    "Generate": names.TEXT_COMPLETION,
    "GenerateStream": names.TEXT_COMPLETION,
    "Embed": names.EMBEDDINGS,
}
"""Paths and procedures that are traced; conversations over gRPC are chats too."""
_HEADERS = ("traceparent", "tracestate")


@dataclass(frozen=True, slots=True)
class Tracing:
    """Traces the requests of one replica."""

    export: TraceExport
    """Takes the spans."""
    model: str
    """The one that is served."""
    addresses: Callable[[], Mapping[str, Any]]
    """``host:port`` of ``http`` and ``grpc``, when they are known."""
    decode: Decode | None
    """None keeps prompts and outputs out."""
    cluster_events: ClusterEvents = field(default_factory=ClusterEvents)

    def begin(
        self, name: str, port: Port, request_id: str, headers: Iterable[tuple[str, str | bytes]]
    ) -> RequestTrace | None:
        """A request to one of ``OPERATIONS``, which the running task serves; None for others."""
        operation = OPERATIONS.get(name)
        if operation is None:
            return None
        parent: dict[str, list[str]] = {}
        for header, value in headers:
            if header in _HEADERS and isinstance(value, str):
                parent.setdefault(header, []).append(value)
        trace = RequestTrace(operation, port, request_id, parent, self._record)
        TRACE.set(trace)
        return trace

    def see(self, snapshot: Mapping[str, Any]) -> None:
        self.cluster_events.take(snapshot, time.monotonic())

    def _record(self, trace: RequestTrace) -> None:
        """Make the spans of a request that is over; logs every error and raises none."""
        try:
            record_request(
                self.export.tracer,
                trace,
                model=self.model,
                address=str(self.addresses().get(trace.port, "")),
                cluster_events=self.cluster_events,
                decode=self.decode,
            )
        except Exception:
            logger.exception("request %s has no trace", trace.request_id)


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
    export = load_exporter(section.otlp_endpoint)(instance)
    return Tracing(export, model, addresses, decode if section.trace_content else None)
