"""The memory limit that all inspections of a gateway replica share, over HTTP and gRPC."""

from __future__ import annotations

from cluster.core.errors import QueueFullError
from gateway.observability.metrics import GatewayMetrics


class InspectionMemory:
    """Counts the bytes of the results of all concurrent inspections, up to a limit.

    Args:
        max_bytes: maximum number of bytes. A single inspection may exceed it.
        metrics: metrics of the replica, which count refused inspections.
    """

    def __init__(self, max_bytes: int, metrics: GatewayMetrics) -> None:
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._held_bytes = 0

    def hold(self, size: int) -> None:
        """Count ``size`` bytes until ``release``. Raises ``QueueFullError`` above the limit."""
        held, most = self._held_bytes, self._max_bytes
        if held and held + size > most:
            text = f"inspections hold {held} bytes, at most {most} may be held"
            error = QueueFullError(text, 1.0)
            self._metrics.admission_rejections.labels(error.limit).inc()
            raise error
        self._held_bytes += size

    def release(self, size: int) -> None:
        """Undo one ``hold`` call."""
        self._held_bytes -= size
