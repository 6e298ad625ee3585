"""Limits and times of a gateway that have no command-line option."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayTuning:
    """Limits and times, which programs that embed a gateway can set."""

    leaving_lead_s: float = 10.0
    """Seconds for which a gateway accepts connections after it has become not ready, so that load
    balancers can remove it first."""
    stream_wait_s: float = 5.0
    """Longest time in seconds that a request waits for a stream to a worker of the cluster."""
    connection_age_s: float = 600.0
    """Age in seconds at which the gateway closes a gRPC connection for new calls. Clients then
    reconnect, to any of the current replicas."""
    body_timeout_s: float = 60.0
    """Seconds in which a client must send its body."""
    drain_pause_s: float = 5.0
    """Seconds without data after which the gateway stops reading the rest of a too long body."""
    ping_after_s: float = 15.0
    """Seconds without events after which a comment is sent so that proxies keep the connection."""
    max_unread_bytes: int = 4 * 1024 * 1024
    """Maximum memory of the outputs of one stream that its client has not read (about 12,000
    tokens); above it, the stream ends."""
    unread_limit_s: float = 60.0
    """Seconds in which the client of a stream must read its outputs; after it, the stream ends."""
    max_file_bytes: int = 64 * 1024 * 1024
    """Maximum size of a file that a client stores."""
    max_uploads: int = 8
    """Maximum number of concurrent uploads. Each file is in memory two or three times."""
    disk_threads: int = 8
    """Number of threads that access the state folder."""
    disk_max_waiting: int = 256
    """Maximum number of accesses that wait for one of the ``disk_threads``."""
    disk_limit_s: float = 15.0
    """Longest time in seconds of an access, with its wait; after it, the request fails."""
    state_sweep_s: float = 600.0
    """Interval in seconds at which expired objects are removed from the state folder."""
    numbers_age_s: float = 1.0
    """Seconds for which all callers share the workers' stats; without API keys, not shared."""
    max_inspection_bytes: int = 256 * 1024 * 1024
    """Maximum memory of all inspection arrays of one replica."""
