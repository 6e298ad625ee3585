"""OpenTelemetry tracer of a process, and the export of its spans.

OpenTelemetry's SDK and exporter (the extra ``otel``) are imported only if an endpoint is set.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from opentelemetry.context import Context
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    Tracer,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from cluster.core.codec import SPAN_ID_BYTES, TRACE_ID_BYTES
from cluster.core.errors import ConfigError
from cluster.core.release import RELEASE
from cluster.tracing.names import ERROR_TYPE, PROVIDER

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

__all__ = ["AttributeValue", "Context", "Span", "SpanKind", "Tracer", "set_span_in_context"]
"""Names of OpenTelemetry's API that other folders use."""

logger = logging.getLogger(__name__)

_STOP_S = 1.0
_NEXT_SPAN_ID: ContextVar[SpanId | None] = ContextVar("_NEXT_SPAN_ID", default=None)
"""Reserved id of the span that is about to start; None for a random id."""


@dataclass(frozen=True, slots=True)
class SpanId:
    """Id of a sampled span, unique in all traces; may be used before the span starts.

    Its serialized form has ``SPAN_ID_BYTES`` bytes.
    """

    trace_id: int
    number: int
    """OpenTelemetry's span id, which is unique within the trace ``trace_id``."""

    @classmethod
    def of(cls, span: Span) -> SpanId:
        context = span.get_span_context()
        return cls(context.trace_id, context.span_id)

    @classmethod
    def from_bytes(cls, data: bytes) -> SpanId:
        head, tail = data[:TRACE_ID_BYTES], data[TRACE_ID_BYTES:]
        return cls(int.from_bytes(head, "big"), int.from_bytes(tail, "big"))

    def to_bytes(self) -> bytes:
        own_bytes = SPAN_ID_BYTES - TRACE_ID_BYTES
        head = self.trace_id.to_bytes(TRACE_ID_BYTES, "big")
        return head + self.number.to_bytes(own_bytes, "big")

    @property
    def context(self) -> SpanContext:
        return SpanContext(
            self.trace_id, self.number, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED)
        )


class TraceExport:
    """Tracer; a background thread of the SDK exports its spans, so that ending a span never waits.

    Args:
        provider: the SDK's provider. Its id generator is replaced.
    """

    def __init__(self, provider: TracerProvider) -> None:
        provider.id_generator = _make_id_generator()
        self.tracer = provider.get_tracer(PROVIDER, RELEASE)
        self._provider = provider

    def new_id(self, span: Span) -> SpanId:
        """Reserve an id for a span that starts later, in the same trace as ``span``."""
        trace_id = span.get_span_context().trace_id
        return SpanId(trace_id, self._provider.id_generator.generate_span_id())

    def start_with_id(self, span_id: SpanId, name: str, parent: Context, **options: Any) -> Span:
        """Start a span with this id; options as in ``Tracer.start_span``."""
        token = _NEXT_SPAN_ID.set(span_id)
        try:
            return self.tracer.start_span(name, parent, **options)
        finally:
            _NEXT_SPAN_ID.reset(token)

    def record(
        self,
        name: str,
        seconds: float,
        attributes: Mapping[str, Any],
        error: str = "",
        span_id: bytes = b"",
    ) -> None:
        """Record a span that took ``seconds`` and has just ended, without a parent.

        Attributes that are None are omitted. ``error``: reason of a failure; empty for success.
        ``span_id``: serialized ``SpanId`` for the span; empty for a random id in a new trace.
        """
        now_ns = time.time_ns()
        known = {name: value for name, value in attributes.items() if value is not None}
        began_ns = now_ns - round(seconds * 1e9)
        start = self.tracer.start_span
        if span_id:
            start = partial(self.start_with_id, SpanId.from_bytes(span_id))
        span = start(name, Context(), attributes=known, start_time=began_ns)
        set_error(span, error)
        span.end(now_ns)

    def record_child(
        self, parent: bytes, name: str, began_ns: int, ended_ns: int, found: Mapping[str, Any]
    ) -> None:
        """Record a child span of a span of another process.

        ``parent``: serialized ``SpanId``. Times are from ``time.monotonic_ns``. ``found``:
        attributes.
        """
        day_ns = time.time_ns() - time.monotonic_ns()
        above = NonRecordingSpan(SpanId.from_bytes(parent).context)
        span = self.tracer.start_span(
            name,
            set_span_in_context(above, Context()),
            attributes=dict(found),
            start_time=day_ns + began_ns,
        )
        span.end(day_ns + ended_ns)

    def stop(self) -> None:
        """Export the remaining spans, for at most one second; later spans are dropped."""
        stopper = threading.Thread(target=self._provider.shutdown, daemon=True)
        stopper.start()
        stopper.join(_STOP_S)


def _make_id_generator() -> RandomIdGenerator:
    """Make an id generator that returns the id in ``_NEXT_SPAN_ID`` if set, else a random one."""
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

    class ChosenIds(RandomIdGenerator):
        def generate_trace_id(self) -> int:
            chosen = _NEXT_SPAN_ID.get()
            return super().generate_trace_id() if chosen is None else chosen.trace_id

        def generate_span_id(self) -> int:
            chosen = _NEXT_SPAN_ID.get()
            return super().generate_span_id() if chosen is None else chosen.number

    return ChosenIds()


def load_exporter(endpoint: str) -> Callable[[str], TraceExport]:
    """Import the exporter; return a function that starts the OTLP export to ``endpoint``.

    The function takes the name of this process. An https endpoint uses TLS. A slow, missing or
    wrong collector only loses spans. The SDK's own environment variables also apply
    (``OTEL_TRACES_SAMPLER``, ``OTEL_EXPORTER_OTLP_HEADERS``, ``OTEL_BSP_...``). Raises
    ``ConfigError`` if OpenTelemetry's packages are missing.
    """
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as err:
        needs = "needs the extra otel: pip install -c constraints.txt -e '.[otel]'"
        raise ConfigError("otlp_endpoint", endpoint, needs) from err

    def start(instance: str) -> TraceExport:
        resource = {
            "service.name": PROVIDER,
            "service.instance.id": instance,
            "service.version": RELEASE,
        }
        provider = TracerProvider(resource=Resource.create(resource), shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        return TraceExport(provider)

    return start


def start_traces(endpoint: str | None, instance: str) -> TraceExport | None:
    """Start to export the spans of this process, named ``instance``.

    Returns None if there is no endpoint or OpenTelemetry's packages are missing.
    """
    if endpoint is None:
        return None
    try:
        return load_exporter(endpoint)(instance)
    except ConfigError as err:
        logger.warning("%s does not export traces: %s", instance, err)
        return None


def parent_context(headers: Mapping[str, Sequence[str]]) -> Context:
    """Return the parent span's context from the headers ``traceparent`` and ``tracestate``.

    Invalid or repeated ``traceparent`` headers count as absent (W3C Trace Context).
    """
    if len(headers.get("traceparent", ())) != 1:
        return Context()
    return TraceContextTextMapPropagator().extract(headers, Context())


def add_link(span: Span, span_id: bytes, attributes: Mapping[str, AttributeValue]) -> None:
    """Link a span to a span of another process, with the serialized ``SpanId`` ``span_id``."""
    span.add_link(SpanId.from_bytes(span_id).context, attributes)


def set_error(span: Span, error: str) -> None:
    """Mark a span as failed, unless ``error`` is empty."""
    if error:
        span.set_attribute(ERROR_TYPE, error)
        span.set_status(StatusCode.ERROR, error)
