"""Limits and waits of a gateway that no option sets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayTuning:
    """Arguments for programs that embed a gateway."""

    leaving_lead_s: float = 10.0
    """Time from a gateway's not-ready answer to its last new connection, so that load balancers
    notice first."""
    stream_wait_s: float = 5.0
    """Time for a serving cluster without an open stream to open one."""
    connection_age_s: float = 600.0
    """Age at which a gRPC connection takes no new calls: clients reconnect, and spread over the
    replicas of that time."""
    body_timeout_s: float = 60.0
    """Time a client has to send its body."""
    drain_pause_s: float = 5.0
    """Silence after which the rest of a body above the limit is not read."""
    ping_after_s: float = 15.0
    """Silence after which an event stream gets a comment, so that proxies keep the connection."""
    max_unread_bytes: int = 4 * 1024 * 1024
    """Bytes of outputs that wait for the client of one stream, about 12,000 tokens; the stream of a
    client further behind ends."""
    unread_limit_s: float = 60.0
    """Time in which the client of a stream must take some of the outputs that wait for it; else the
    stream ends."""
    max_file_bytes: int = 64 * 1024 * 1024
    """Bytes of a file that a client stores."""
    max_uploads: int = 8
    """Files that are stored at a time: each is in memory two or three times."""
    disk_threads: int = 8
    """Calls of requests that use the state folder at a time."""
    disk_max_waiting: int = 256
    """Calls that may wait for one of these threads."""
    disk_limit_s: float = 15.0
    """Longest time of such a call; a request that needs it fails then."""
    state_sweep_s: float = 600.0
    """Interval at which expired objects leave the state folder."""
    numbers_age_s: float = 1.0
    """Time for which callers share the numbers that were collected from the workers, where keys are
    configured."""
    max_inspection_bytes: int = 256 * 1024 * 1024
    """Bytes of the arrays of inspections that one replica holds at a time."""
