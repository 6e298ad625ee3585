"""A collector that speaks OTLP over gRPC, in this process: what a real one would be sent."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

WAIT_S = 60.0
"""Longest wait for a span."""
SERVER = Span.SPAN_KIND_SERVER


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resource: dict[str, Any] = {}
        self.endpoint = ""
        self._changed = threading.Condition()

    def Export(
        self, request: pb.ExportTraceServiceRequest, context: Any
    ) -> pb.ExportTraceServiceResponse:
        """See ``TraceService``."""
        with self._changed:
            for group in request.resource_spans:
                self.resource = plain(group.resource.attributes)
                for scope in group.scope_spans:
                    self.spans.extend(scope.spans)
            self._changed.notify_all()
        return pb.ExportTraceServiceResponse()

    def trace(self, trace_id: str) -> list[Span]:
        """The spans of a trace whose outermost span has come, that one first."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_root(trace_id), WAIT_S)
            found = [span for span in self.spans if span.trace_id.hex() == trace_id]
        assert any(span.kind == SERVER for span in found), f"no trace {trace_id}"
        return sorted(found, key=lambda span: span.kind != SERVER)

    def named(self, name: str) -> Span:
        """The one span of this name, once it has come."""
        with self._changed:
            self._changed.wait_for(lambda: any(s.name == name for s in self.spans), WAIT_S)
            (span,) = (span for span in self.spans if span.name == name)
            return span

    def answer(self, name: str) -> Span:
        """The span of the request that got the answer of this id."""

        def found() -> list[Span]:
            by_id = ((plain(s.attributes).get("gen_ai.response.id"), s) for s in self.spans)
            return [span for other, span in by_id if other == name]

        with self._changed:
            self._changed.wait_for(lambda: bool(found()), WAIT_S)
            (span,) = found()
            return span

    def wait_for(self, is_enough: Callable[[list[Span]], bool], what: str) -> None:
        """Wait until enough spans have come."""
        with self._changed:
            came = self._changed.wait_for(lambda: is_enough(self.spans), WAIT_S)
        assert came, f"no {what}"

    def _has_root(self, trace_id: str) -> bool:
        return any(s.trace_id.hex() == trace_id and s.kind == SERVER for s in self.spans)


@contextlib.contextmanager
def running_collector() -> Iterator[Collector]:
    """A collector on a free loopback port."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    add_servicer: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
    add_servicer(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    collector.endpoint = f"http://127.0.0.1:{port}"
    try:
        yield collector
    finally:
        server.stop(0).wait(WAIT_S)


def plain(attributes: Any) -> dict[str, Any]:
    """Attributes by name."""
    return {entry.key: _value(entry.value) for entry in attributes if isinstance(entry, KeyValue)}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(entry) for entry in value.array_value.values]
    return None if kind is None else getattr(value, kind)
