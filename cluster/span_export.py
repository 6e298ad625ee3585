"""Sends spans to an OpenTelemetry collector over OTLP. The only module that imports OpenTelemetry.

It is imported where an endpoint is given, so that nobody else needs the package or pays for it. A
thread of the SDK's sends batches; a collector that is slow, gone or wrong costs spans and nothing
else. The SDK's own variables are in force beside ours (``OTEL_TRACES_SAMPLER``,
``OTEL_EXPORTER_OTLP_HEADERS``, ``OTEL_BSP_...``).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from importlib import metadata

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cluster.spans import ERROR_TYPE, Span

_NAME = "expertmesh"
_PARENT = "traceparent"


class SpanExport:
    """Where spans go.

    Args:
        endpoint: URL of the collector; https is TLS.
        instance: name of this process, among those of the service.
    """

    def __init__(self, endpoint: str, instance: str) -> None:
        version = _own_version()
        resource = Resource.create(
            {
                "service.name": _NAME,
                "service.instance.id": instance,
                "service.version": version,
            }
        )
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=endpoint)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(_NAME, version)
        self._propagator = TraceContextTextMapPropagator()

    def send(self, span: Span, headers: Mapping[str, Sequence[str]] | None = None) -> None:
        """Queue a span with its parts; never waits.

        ``headers`` are ``traceparent`` and ``tracestate`` of the request, each with every value
        that came: it belongs to that trace, and is sent if that is sampled. What is not valid
        counts as absent (W3C Trace Context).
        """
        context = Context()
        if headers is not None and len(headers.get(_PARENT, ())) == 1:
            context = self._propagator.extract(headers, context)
        self._send(span, context)

    def stop(self, limit_s: float) -> None:
        """Send what is left, within ``limit_s``; what comes later is dropped."""
        stopper = threading.Thread(target=self._provider.shutdown, daemon=True)
        stopper.start()
        stopper.join(limit_s)

    def _send(self, span: Span, context: Context) -> None:
        made = self._tracer.start_span(
            span.name,
            context,
            kind=trace.SpanKind.SERVER if span.is_server else trace.SpanKind.INTERNAL,
            attributes=span.attributes,
            start_time=span.began_ns,
        )
        if not made.is_recording():
            return  # not sampled, and so are its parts
        for event in span.events:
            made.add_event(event.name, event.attributes, event.time_ns)
        if span.error:
            made.set_attribute(ERROR_TYPE, span.error)
            made.set_status(trace.StatusCode.ERROR, span.error)
        within = trace.set_span_in_context(made, context)
        for child in span.children:
            self._send(child, within)
        made.end(span.ended_ns)


def _own_version() -> str:
    try:
        return metadata.version(_NAME)
    except metadata.PackageNotFoundError:
        return "0+unknown"
