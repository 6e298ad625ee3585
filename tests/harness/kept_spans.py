"""Spans that stay in this process."""

from __future__ import annotations

from collections.abc import Sequence

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cluster.tracing.exporter import TraceExport


class KeptSpans:
    """A ``TraceExport`` and what it was given."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.export = TraceExport(provider)

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        """In the order in which they ended."""
        return self._exporter.get_finished_spans()


def times_ns(span: ReadableSpan) -> tuple[int, int]:
    """When it began and ended, since 1970."""
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time, span.end_time
