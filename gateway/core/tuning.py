"""Limits and waits of a gateway without options."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayTuning:
    """Limits and waits, for programs that embed a gateway."""

    leaving_lead_s: float = 10.0
    """Time for which a gateway that reports not to be ready accepts connections, so that load
    balancers notice first."""
    stream_wait_s: float = 5.0
    """Longest wait for a stream to a worker while the cluster serves."""
    connection_age_s: float = 600.0
    """Age at which a gRPC connection takes no new calls; clients reconnect and spread over the
    current replicas."""
    body_timeout_s: float = 60.0
    """Time in which a client must send its body."""
    drain_pause_s: float = 5.0
    """Time without data after which the rest of a too long body is not read."""
    ping_after_s: float = 15.0
    """Time without events after which a comment is sent, so that proxies keep the connection."""
    max_unread_bytes: int = 4 * 1024 * 1024
    """Memory of outputs that wait for the client of one stream (about 12,000 tokens); above it the
    stream ends."""
    unread_limit_s: float = 60.0
    """Time in which the client of a stream must read waiting outputs; otherwise the stream ends."""
    max_file_bytes: int = 64 * 1024 * 1024
    """Largest size of a file that a client stores."""
    max_uploads: int = 8
    """Concurrent uploads; each file is in memory two or three times."""
    disk_threads: int = 8
    """Threads for calls to the state folder."""
    disk_max_waiting: int = 256
    """Calls that may wait for one of these threads."""
    disk_limit_s: float = 15.0
    """Longest time of such a call; after it the request fails."""
    state_sweep_s: float = 600.0
    """Interval at which expired objects are removed from the state folder."""
    numbers_age_s: float = 1.0
    """Time for which callers share collected statistics of the workers, if keys are configured."""
    max_inspection_bytes: int = 256 * 1024 * 1024
    """Memory of all inspection arrays of one replica."""
