"""Configuration of KV events, which report cached blocks to the routers of other projects."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field

from cluster.config.option_metadata import INTERNAL
from cluster.core.checks import check, check_each, is_at_least_1

_ENDPOINT = re.compile(r"tcp://(?P<host>\*|\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):(?P<port>\d{1,5})")
_RULE = "must be tcp://HOST:PORT with a port from 1 to 65535"
_MAX_TOPIC = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class KvEventsSection:
    """Events about cached KV blocks, over ZeroMQ in vLLM's format."""

    kv_events_endpoint: str | None = None
    """ZeroMQ endpoint at which attention workers publish their cached KV blocks with the tokens,
    for routers of other projects. With tcp://*:5557 each worker listens, on successive ports; with
    a host name it connects. Any client that reaches the port can read the prompts."""
    kv_events_replay_endpoint: str | None = None
    """ZeroMQ endpoint at which routers request missed events, such as tcp://*:6557; by default
    none."""
    kv_events_topic: str = ""
    """ZeroMQ topic of the events; llm-d's router expects kv@ADDRESS@MODEL."""
    kv_events_buffer_steps: int = field(default=10_000, metadata=INTERNAL)
    """Number of steps with KV events that are kept for replay, and may wait for one subscriber."""

    def __post_init__(self) -> None:
        for name in ("kv_events_endpoint", "kv_events_replay_endpoint"):
            if (value := getattr(self, name)) is not None:
                check(_port(value) is not None, name, value, _RULE)
        replay = self.kv_events_replay_endpoint
        has_events = self.kv_events_endpoint is not None
        check(replay is None or has_events, "kv_events_replay_endpoint", replay, _NEEDS_EVENTS)
        rule = "must listen: its host must be *, 0.0.0.0, [::] or an address of loopback"
        listens = replay is None or is_listening(replay)
        check(listens, "kv_events_replay_endpoint", replay, rule)
        rule = f"must have {_MAX_TOPIC} characters at most"
        check(len(self.kv_events_topic) <= _MAX_TOPIC, "kv_events_topic", "...", rule)
        check_each(self, "kv_events_buffer_steps", is_at_least_1, "must be at least 1")

    def check_ranks(self, num_ranks: int) -> None:
        """Raise ``ConfigError`` unless ``num_ranks`` attention workers each get separate ports."""
        ports: list[int] = []
        for name in ("kv_events_endpoint", "kv_events_replay_endpoint"):
            value = getattr(self, name)
            if value is None or not is_listening(value):
                continue
            port = _port(value) or 0
            rule = f"must leave {num_ranks} ports up to 65535: one for each attention worker"
            check(port + num_ranks - 1 <= 65535, name, value, rule)
            rule = (
                f"must be {num_ranks} ports or more away from kv_events_endpoint: each attention "
            )
            rule += "worker takes one of each"
            check(all(abs(port - other) >= num_ranks for other in ports), name, value, rule)
            ports.append(port)


_NEEDS_EVENTS = "needs kv_events_endpoint"


def is_listening(endpoint: str) -> bool:
    """Return whether a worker listens on the endpoint; if not, it connects to a router there."""
    host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    if host == "*":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_unspecified or address.is_loopback


def rank_endpoint(endpoint: str, rank: int) -> str:
    """Return the endpoint of an attention rank; each listening rank has its own port."""
    if not is_listening(endpoint):
        return endpoint
    head, _, port = endpoint.rpartition(":")
    return f"{head}:{int(port) + rank}"


def _port(endpoint: str) -> int | None:
    found = _ENDPOINT.fullmatch(endpoint)
    port = int(found["port"]) if found is not None else 0
    return port if 1 <= port <= 65535 else None
