"""Traces of what happens to the cluster: changes of the placement, weights that move, recoveries.

A span is made when the change is over, from what the controller counts anyway. Each is a trace of
its own; the requests that ran meanwhile have events instead (``gateway.cluster.events``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.config.cluster import ObservabilitySection
from cluster.controller.controller import Controller
from cluster.controller.parts.metrics import MoveReason
from cluster.core.errors import ConfigError
from cluster.tracing import names
from cluster.tracing.exporter import Context, TraceExport, load_exporter, set_error

logger = logging.getLogger(__name__)


class ClusterTraces:
    """Follows a controller from now on."""

    def __init__(self, export: TraceExport, controller: Controller) -> None:
        self.stop = export.stop
        self._tracer = export.tracer
        controller.cluster.metrics.on_moved = self._moved
        controller.cluster.metrics.on_recovered = self._recovered
        controller.rebalancing.on_end = self._rebalanced

    def _moved(self, reason: MoveReason, num_slots: int, num_bytes: int, seconds: float) -> None:
        attributes = {names.REASON: reason, names.SLOTS: num_slots, names.BYTES: num_bytes}
        self._record(names.MIGRATION, seconds, attributes)

    def _recovered(self, lost: Sequence[str], seconds: float) -> None:
        self._record(names.RECOVERY, seconds, {names.LOST_WORKERS: lost})

    def _rebalanced(self, report: Mapping[str, Any]) -> None:
        balancedness = report["balancedness"]
        attributes = {
            names.OUTCOME: report["outcome"],
            names.PLACEMENT_EPOCH: report["epoch"],
            names.SLOTS: report["slots_moved"],
            names.BYTES: report["bytes"],
            names.BALANCEDNESS_BEFORE: balancedness["before"],
            names.BALANCEDNESS_PREDICTED: balancedness["predicted"],
        }
        known = {name: value for name, value in attributes.items() if value is not None}
        error = "failed" if report["outcome"] == "failed" else ""
        self._record(names.REBALANCE, report["seconds"], known, error)

    def _record(
        self, name: str, seconds: float, attributes: Mapping[str, Any], error: str = ""
    ) -> None:
        """Record a change that has ended just now; logs every error and raises none."""
        now_ns = time.time_ns()
        try:
            began_ns = now_ns - round(seconds * 1e9)
            span = self._tracer.start_span(
                name, Context(), attributes=attributes, start_time=began_ns
            )
            set_error(span, error)
            span.end(now_ns)
        except Exception:
            logger.exception("no trace of %s", name)


def trace_cluster(controller: Controller, section: ObservabilitySection) -> ClusterTraces | None:
    """Traces of a controller; None without an endpoint, or without the packages for it."""
    endpoint = section.otlp_endpoint
    if endpoint is None:
        return None
    try:
        export = load_exporter(endpoint)("controller")
    except ConfigError as err:
        logger.warning("the cluster has no traces: %s", err)
        return None
    return ClusterTraces(export, controller)
