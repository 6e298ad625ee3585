"""Time limits of the controller."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.config.cluster import ClusterConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ControllerSettings:
    detection_limit_s: float = 2.0
    """Longest time without heartbeat or progress before a worker is declared lost."""
    hold_limit_s: float = 30.0
    """Longest time that workers are not declared lost while most other hosts are silent."""
    confirm_s: float = 0.2
    """Time from a peer's report of a lost worker until the worker is declared lost for it."""
    mismatch_s: float = 1.0
    """Longest time for which a member may report a generation or epoch that is not in force."""
    start_limit_s: float = 600.0
    """Limit of the whole start; later of a new worker, from process start and from registration."""
    start_silence_s: float = 30.0
    """``detection_limit_s`` while workers start, since imports and loading starve other threads."""
    load_limit_s: float = 600.0
    """Time limit for a running worker to load experts."""
    retry_s: float = 5.0
    """Pause before experts that no worker could load are tried again; doubles each time."""
    generation_limit_s: float = 15.0
    """Time limit for a member to join a new generation."""
    join_limit_s: float = 4.0
    """Longest time that running workers wait for new workers to join a generation."""
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
            # every generation sets up torch.distributed; with sockets only new workers connect
            join_limit_s=generation_limit_s if config.is_collective else 2 * limit_s,
        )
