"""Exports spans to an OpenTelemetry collector over OTLP.

It is imported only where an endpoint is given: no other process needs the packages. A collector
that is slow, gone or wrong costs spans and nothing else. The SDK's own variables are in force
beside ours (``OTEL_TRACES_SAMPLER``, ``OTEL_EXPORTER_OTLP_HEADERS``, ``OTEL_BSP_...``).
"""

from __future__ import annotations

from collections.abc import Mapping

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor


def make_provider(endpoint: str, resource: Mapping[str, str]) -> TracerProvider:
    """Export the spans of ``resource``, this process, to a URL (https is TLS)."""
    provider = TracerProvider(resource=Resource.create(resource), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider
