"""Admits calls to a gateway replica, by the current capacity of the engines."""

from __future__ import annotations

import math
import time

from cluster.config.gateway import GatewaySection
from cluster.core.errors import DeadlineExceededError, QueueFullError
from gateway.calls.admission import Admission, Ticket
from gateway.calls.tenant_queues import CallDemand
from gateway.engines.engine_pool import EnginePool
from gateway.observability.metrics import GatewayMetrics


class AdmissionController:
    """Admits calls within the limits of the queue; refuses and counts all other calls.

    Args:
        limits: configuration with the limits of the queue.
        max_num_seqs: number of sequences that each engine runs at a time.
        engines: streams to the engines.
        metrics: metrics of the replica.
    """

    def __init__(
        self,
        limits: GatewaySection,
        max_num_seqs: int,
        engines: EnginePool,
        metrics: GatewayMetrics,
    ) -> None:
        self._limits = limits
        self._max_num_seqs = max_num_seqs
        self._engines = engines
        self._metrics = metrics
        self.admission: Admission | None = None
        """Counts of the admitted requests; None before the first call."""

    @property
    def num_requests(self) -> int:
        """Number of admitted engine requests (one per prompt) that have not ended."""
        return self.admission.num_requests if self.admission else 0

    def admit(self, demand: CallDemand, max_model_len: int, deadline_s: float) -> Ticket:
        """Admit a call; return its queue entry. Raises the errors of ``require_capacity``."""
        return self.require_capacity(demand, max_model_len, deadline_s).admit(
            demand, time.monotonic()
        )

    def require_capacity(
        self, demand: CallDemand, max_model_len: int, deadline_s: float
    ) -> Admission:
        """Check that a call can be admitted now and would run before ``deadline_s`` (monotonic).

        Returns the counts of the admitted requests, to which the call can be added.

        Raises:
            QueueFullError: a limit of the queue is exceeded.
            DeadlineExceededError: the call would wait in the queue beyond its deadline.
        """
        admission, now_s = self._with_current_capacity(max_model_len), time.monotonic()
        try:
            admission.check(demand, now_s)
        except QueueFullError as err:
            self._metrics.admission_rejections.labels(err.limit).inc()
            raise
        if admission.queue_time_s(demand) > deadline_s - now_s:
            self._metrics.admission_rejections.labels("deadline").inc()
            raise DeadlineExceededError(
                "the request would wait in the queue beyond its deadline", False
            )
        return admission

    def _with_current_capacity(self, max_model_len: int) -> Admission:
        """Return the counts of admitted requests, with the current capacity of the engines."""
        limits = self._limits
        if self.admission is None:
            self.admission = Admission(
                max_requests=limits.max_queue,
                max_tokens=limits.max_queue_tokens or limits.max_queue * max_model_len,
                max_wait_s=limits.max_queue_wait_s or math.inf,
            )
        share = -(-self._max_num_seqs // limits.num_gateway_replicas)
        self.admission.capacity = self._engines.workers.num_seats(share)
        return self.admission
