"""Traces of what happens to the cluster: changes of the placement, weights that move, recoveries.

Made when each is over, of what the controller counts anyway. They are traces of their own; the
requests that ran meanwhile have events instead (``gateway.cluster_moments``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cluster import spans
from cluster.config import ObservabilitySection
from cluster.controller import Controller
from cluster.errors import ConfigError
from cluster.migrations import MoveReason
from cluster.spans import Exporter, Span, Value, load_exporter

logger = logging.getLogger(__name__)

_INSTANCE = "controller"
_STOP_S = 1.0
"""Time for what is left at the end."""


class ClusterTraces:
    """What is called at the end of each."""

    def __init__(self, export: Exporter) -> None:
        self._export = export

    def follow(self, controller: Controller) -> None:
        """Be called from now on."""
        controller.migrations.on_add = self.moved
        controller.recovery.stalls.on_ran = self.recovered
        controller.rebalancing.on_end = self.rebalanced

    def moved(self, reason: MoveReason, num_slots: int, num_bytes: int, seconds: float) -> None:
        """See ``Migrations.add``."""
        attributes = {spans.REASON: reason, spans.SLOTS: num_slots, spans.BYTES: num_bytes}
        self._send(spans.MIGRATION, seconds, attributes)

    def recovered(self, names: Sequence[str], seconds: float) -> None:
        """See ``Stalls.on_ran``."""
        self._send(spans.RECOVERY, seconds, {spans.LOST_WORKERS: names})

    def rebalanced(self, report: Mapping[str, Any]) -> None:
        """See ``RebalanceJob.report``."""
        balancedness = report["balancedness"]
        attributes = {
            spans.OUTCOME: report["outcome"],
            spans.PLACEMENT_EPOCH: report["epoch"],
            spans.SLOTS: report["slots_moved"],
            spans.BYTES: report["bytes"],
            spans.BALANCEDNESS_BEFORE: balancedness["before"],
            spans.BALANCEDNESS_PREDICTED: balancedness["predicted"],
        }
        known = {name: value for name, value in attributes.items() if value is not None}
        error = "failed" if report["outcome"] == "failed" else ""
        self._send(spans.REBALANCE, report["seconds"], known, error)

    def stop(self) -> None:
        """Send what is left; blocks for a second at most."""
        self._export.stop(_STOP_S)

    def _send(
        self, name: str, seconds: float, attributes: Mapping[str, Value], error: str = ""
    ) -> None:
        """It has ended just now. A failure here is not the cluster's."""
        now_ns = time.time_ns()
        began_ns = now_ns - round(seconds * 1e9)
        try:
            self._export.send(
                Span(
                    name=name,
                    began_ns=began_ns,
                    ended_ns=now_ns,
                    attributes=attributes,
                    error=error,
                )
            )
        except Exception:
            logger.exception("no trace of %s", name)


def trace_cluster(controller: Controller, section: ObservabilitySection) -> ClusterTraces | None:
    """Follow a controller, where an endpoint is given and its packages are here."""
    endpoint = section.otlp_endpoint
    if endpoint is None:
        return None
    try:
        export = load_exporter(endpoint)(endpoint, _INSTANCE)
    except ConfigError as err:
        logger.warning("the cluster has no traces: %s", err)
        return None
    traces = ClusterTraces(export)
    traces.follow(controller)
    return traces
