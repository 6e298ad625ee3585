"""Time limits of the controller."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.config.cluster import ClusterConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ControllerSettings:
    detection_limit_s: float = 2.0
    """Longest time without sign of life or progress before a worker is declared lost."""
    hold_limit_s: float = 30.0
    """Longest time for which no silent worker is declared lost if most other hosts are silent."""
    confirm_s: float = 0.2
    """Time from a peer's report that a worker is lost until the worker is declared lost."""
    mismatch_s: float = 1.0
    """Longest time for which a member may report a generation or epoch that is not in force."""
    start_limit_s: float = 600.0
    """Time limit of the cluster's start; later, of each new worker: to register, and to load."""
    start_silence_s: float = 30.0
    """Detection limit while workers start, because imports and loading delay other threads."""
    load_limit_s: float = 600.0
    """Time limit for a running worker to load experts, from the command to the reply."""
    retry_s: float = 5.0
    """Pause before workers retry to load experts that none could load; doubles each time."""
    generation_limit_s: float = 15.0
    """Time limit for a member to join a new generation."""
    join_limit_s: float = 4.0
    """Longest time for which running workers wait for a new worker to join a generation."""
    collect_limit_s: float = 10.0
    """Time in which workers must connect to a restarted controller; others are declared lost."""

    @classmethod
    def of(cls, config: ClusterConfig) -> ControllerSettings:
        """Derive the time limits of the controller from the cluster's configuration."""
        section = config.transport
        limit_s, generation_limit_s = section.detection_limit_s, section.connect_timeout_s + 5.0
        return cls(
            detection_limit_s=limit_s,
            generation_limit_s=generation_limit_s,
            # every generation sets up torch.distributed; with sockets only new workers connect
            join_limit_s=generation_limit_s if config.is_collective else 2 * limit_s,
        )
