"""Limits of the controller."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.config.cluster import ClusterConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ControllerSettings:
    detection_limit_s: float = 2.0
    """Time without heartbeat or progress after which a worker is lost, at the latest."""
    hold_limit_s: float = 30.0
    """Longest silence of most other hosts without losses: its own host may be the cause."""
    confirm_s: float = 0.2
    """Time in which another cause may show up for a worker that a peer reported as lost."""
    mismatch_s: float = 1.0
    """Time for which a member may report another generation or epoch than the controller knows."""
    start_limit_s: float = 600.0
    """Limit for the whole start; later, for a new worker from its registration."""
    start_silence_s: float = 30.0
    """``detection_limit_s`` while workers start: importing and loading starve other threads."""
    load_limit_s: float = 600.0
    """Limit for a running worker that loads experts."""
    retry_s: float = 5.0
    """Pause before the load of experts is retried if no worker could load them; doubles."""
    generation_limit_s: float = 15.0
    """Limit for a member to take part in a new generation."""
    join_limit_s: float = 4.0
    """Time for which other workers may wait for new workers to take part."""
    collect_limit_s: float = 10.0
    """Time in which workers must connect to a restarted controller to avoid being lost."""

    @classmethod
    def of(cls, config: ClusterConfig) -> ControllerSettings:
        """Derive the limits from a configuration."""
        section = config.transport
        limit_s, generation_limit_s = section.detection_limit_s, section.connect_timeout_s + 5.0
        return cls(
            detection_limit_s=limit_s,
            generation_limit_s=generation_limit_s,
            # a world is built for each generation, a socket only for each new worker
            join_limit_s=generation_limit_s if config.is_collective else 2 * limit_s,
        )
