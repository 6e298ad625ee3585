"""The tracer of a process, and the export of its spans.

OpenTelemetry's SDK and its exporter (the extra ``otel``) are loaded only for an endpoint.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from opentelemetry.context import Context
from opentelemetry.trace import (
    Span,
    SpanKind,
    StatusCode,
    Tracer,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from cluster.core.errors import ConfigError
from cluster.core.release import RELEASE
from cluster.tracing.names import ERROR_TYPE, PROVIDER

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

__all__ = ["AttributeValue", "Context", "Span", "SpanKind", "Tracer", "set_span_in_context"]
"""What other folders use of OpenTelemetry's API."""

logger = logging.getLogger(__name__)

_STOP_S = 1.0


class TraceExport:
    """A tracer whose spans a thread of the SDK exports: ending a span never waits.

    Args:
        provider: the SDK's.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self.tracer = provider.get_tracer(PROVIDER, RELEASE)
        self._provider = provider

    def record(
        self, name: str, seconds: float, attributes: Mapping[str, Any], error: str = ""
    ) -> None:
        """Record what has ended just now as a trace of its own. Attributes of None are unknown."""
        now_ns = time.time_ns()
        known = {name: value for name, value in attributes.items() if value is not None}
        began_ns = now_ns - round(seconds * 1e9)
        span = self.tracer.start_span(name, Context(), attributes=known, start_time=began_ns)
        set_error(span, error)
        span.end(now_ns)

    def stop(self) -> None:
        """Export what is left, for a second at most; later spans are dropped."""
        stopper = threading.Thread(target=self._provider.shutdown, daemon=True)
        stopper.start()
        stopper.join(_STOP_S)


def load_exporter(endpoint: str) -> Callable[[str], TraceExport]:
    """The function that starts the export to ``endpoint`` (https is TLS), given the name of this
    process, over OTLP.

    A collector that is slow, gone or wrong costs spans and nothing else. The SDK's own variables
    are in force beside ours (``OTEL_TRACES_SAMPLER``, ``OTEL_EXPORTER_OTLP_HEADERS``,
    ``OTEL_BSP_...``). Raises ``ConfigError`` where its packages are missing.
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
    """The export of this process; None without an endpoint, or without the packages for it."""
    if endpoint is None:
        return None
    try:
        return load_exporter(endpoint)(instance)
    except ConfigError as err:
        logger.warning("%s has no traces: %s", instance, err)
        return None


def parent_of(headers: Mapping[str, Sequence[str]]) -> Context:
    """The parent named by ``traceparent`` and ``tracestate``, each with every value that came.

    An invalid one counts as absent (W3C Trace Context).
    """
    if len(headers.get("traceparent", ())) != 1:
        return Context()
    return TraceContextTextMapPropagator().extract(headers, Context())


def set_error(span: Span, error: str) -> None:
    """Mark a span as failed, unless ``error`` is empty."""
    if error:
        span.set_attribute(ERROR_TYPE, error)
        span.set_status(StatusCode.ERROR, error)
