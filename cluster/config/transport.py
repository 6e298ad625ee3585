"""Options of the data plane and of failure detection."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cluster.config.option_metadata import INTERNAL
from cluster.core.checks import check, check_choice, check_each, is_positive

Transport = Literal["auto", "sockets", "collective"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TransportSection:
    """The data plane and failure detection."""

    transport: Transport = "auto"
    """How workers exchange rows: ``sockets``, ``collective`` (torch.distributed, NCCL on GPUs), or
    ``auto``: ``collective`` if each worker has a GPU, otherwise ``sockets``."""
    detection_limit_s: float = 2.0
    """Time without heartbeats or step progress after which a worker is declared lost."""
    heartbeat_s: float = field(default=0.5, metadata=INTERNAL)
    """Time in seconds between two heartbeats of a worker."""
    connect_timeout_s: float = field(default=10.0, metadata=INTERNAL)
    """Time limit in seconds for opening a connection of a worker, with the handshake."""
    step_timeout_s: float = field(default=60.0, metadata=INTERNAL)
    """Time limit in seconds for one wait on a peer within a step, if nothing else reports the loss
    of the peer.
    """

    def __post_init__(self) -> None:
        check_choice("transport", self.transport, Transport)
        times = "detection_limit_s heartbeat_s connect_timeout_s step_timeout_s"
        check_each(self, times, is_positive, "must be positive")
        rule = f"must be below detection_limit_s ({self.detection_limit_s})"
        check(self.heartbeat_s < self.detection_limit_s, "heartbeat_s", self.heartbeat_s, rule)

    @property
    def alive_s(self) -> float:
        """Time in seconds between two signs of life of a worker, such as a heartbeat."""
        return min(self.heartbeat_s, max(0.1, self.detection_limit_s / 20))

    @property
    def lease_s(self) -> float:
        """Seconds without a controller reply or a committed step until a worker stops serving.

        The controller may declare the worker lost earlier, because no step commits without the
        worker.
        """
        return 1.8 * self.detection_limit_s
