"""Traces of what happens to the cluster: changes of the placement, weights that move, recoveries.

A span is made when the change is over, from what the controller counts anyway. Each is a trace of
its own; the requests that ran meanwhile have events instead (``gateway.cluster.events``).
"""

from __future__ import annotations

import logging
import time

from cluster.config.cluster import ObservabilitySection
from cluster.controller.parts.effects import Trace
from cluster.core.errors import ConfigError
from cluster.tracing.exporter import Context, TraceExport, load_exporter, set_error

logger = logging.getLogger(__name__)


def record(export: TraceExport, trace: Trace) -> None:
    """Record a change that has ended just now; logs every error and raises none."""
    now_ns = time.time_ns()
    known = {name: value for name, value in trace.attributes.items() if value is not None}
    try:
        began_ns = now_ns - round(trace.seconds * 1e9)
        span = export.tracer.start_span(
            trace.name, Context(), attributes=known, start_time=began_ns
        )
        set_error(span, trace.error)
        span.end(now_ns)
    except Exception:
        logger.exception("no trace of %s", trace.name)


def cluster_traces(section: ObservabilitySection) -> TraceExport | None:
    """None without an endpoint, or without the packages for it."""
    if section.otlp_endpoint is None:
        return None
    try:
        return load_exporter(section.otlp_endpoint)("controller")
    except ConfigError as err:
        logger.warning("the cluster has no traces: %s", err)
        return None
