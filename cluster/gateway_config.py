"""The configuration's section for the gateway: ports, keys, TLS, limits of a request."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from typing import Literal

from cluster.api_keys import hash_key
from cluster.config_checks import check, check_choice

_LIMITS = (
    *("max_body_bytes", "max_json_depth", "max_batch_prompts", "max_choices", "max_stop_strings"),
    *("max_stop_chars", "request_timeout_s"),
)
_METRICS_PREFIX = re.compile("[a-zA-Z_:][a-zA-Z0-9_:]*")
EndStage = Literal["lead", "refuse", "fail"]
"""How a gateway ends with its server: requests are led elsewhere but served, then none is taken,
then those that are left are told that it is over."""
MAX_BODY_BYTES = 8 * 1024 * 1024
"""Largest HTTP body unless told."""
RoutingPolicyName = Literal["kv", "least-loaded", "round-robin"]


def is_loopback(host: str) -> bool:
    """Nobody else reaches a server on this interface; an empty one is all interfaces."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def reachable_host(host: str) -> str:
    """Where this host reaches a server that was bound to an interface, as in a URL."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewaySection:
    """The front door."""

    host: str = "127.0.0.1"
    """Interface of HTTP and gRPC."""
    port: int = 8000
    """HTTP port."""
    grpc_port: int = 50051
    """gRPC port."""
    admin_port: int | None = None
    """HTTP port of the admin service; None is 8001, or a free one if it is in use."""
    admin_grpc_port: int | None = None
    """Its gRPC port; None is 50052, or a free one if it is in use."""
    num_gateway_replicas: int = 1
    """Gateway copies behind Ray Serve."""
    routing_policy: RoutingPolicyName = "kv"
    """How an attention worker is picked; see ``gateway.router.RoutingPolicy``."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Keys that clients must present, kept as digests; none and no file: none is asked for."""
    api_key_file: str | None = None
    """File with more of them, their names and limits; read again when it changes."""
    key_max_concurrent: int | None = 256
    """Requests of one key that a replica serves at once, where the file has no other limit."""
    key_requests_per_minute: float | None = None
    """Requests of one key in a minute; None is no limit."""
    key_tokens_per_minute: float | None = None
    """Prompt and output tokens of one key in a minute; None is no limit."""
    admin_host: str = "127.0.0.1"
    """Interface of both admin ports."""
    admin_keys: tuple[str, ...] = field(default=(), repr=False)
    """Keys of the admin ports, kept as digests; none and no file: the other keys, on loopback."""
    admin_key_file: str | None = None
    """File with more of them."""
    tls_cert: str | None = None
    """PEM file of the certificate, with its chain, that all ports serve with; None: no TLS."""
    tls_key: str | None = None
    """PEM file of its key, not encrypted."""
    tls_client_ca: str | None = None
    """PEM file of authorities: clients must have a certificate of one of them."""
    allow_unauthenticated: bool = False
    """Allow a public host without keys."""
    public_metrics: bool = False
    """Ask for no key at ``/metrics``."""
    cors_origins: tuple[str, ...] = ()
    """Web pages of these origins may call the HTTP interface from a browser; ``*`` is any."""
    debug_headers: bool = False
    """Answers name the gateway replica that gave them."""
    trust_request_chat_template: bool = False
    """Render the chat templates that clients send; a template can keep a core busy for ever."""
    max_body_bytes: int = MAX_BODY_BYTES
    """Largest HTTP body."""
    max_json_depth: int = 64
    """Deepest nesting of an HTTP body."""
    max_batch_prompts: int = 256
    """Prompts in one completion request."""
    max_n: int = 16
    """Choices a prompt."""
    max_choices: int = 512
    """Prompts times choices in one request."""
    max_stop_strings: int = 16
    """Stop strings a request."""
    max_stop_chars: int = 256
    """Characters of one stop string."""
    max_logprobs: int = 20
    """Alternatives reported for a token."""
    max_queue: int = 1024
    """Requests that a replica holds at once, running or waiting."""
    max_queue_tokens: int | None = None
    """Prompt and output tokens that they may need together; None is ``max_queue`` contexts."""
    request_timeout_s: float = 600.0
    """Longest life of a request."""
    drain_lead_s: float = 5.0
    """After SIGTERM: time of serving on without being ready, so that load balancers hear of it."""
    drain_timeout_s: float = 120.0
    """Then: time that running requests have to end, while no more are taken."""
    metrics_all_experts: bool = False
    """A metric for every expert of every layer, not for the busiest ones and the rest."""
    metrics_prefix: str = "expertmesh:"
    """In front of every metric's name."""

    def __post_init__(self) -> None:
        taken: dict[int, str] = {}
        for name in ("port", "grpc_port", "admin_port", "admin_grpc_port"):
            value = getattr(self, name)
            if value is None:
                continue
            check(0 <= value <= 65535, name, value, "must be a port number (0 to 65535)")
            check(
                value == 0 or value not in taken,
                name,
                value,
                f"must differ from {taken.get(value)} ({value})",
            )
            taken[value] = name
        check(1 <= self.max_n <= 128, "max_n", self.max_n, "must be 1 to 128")
        for name in ("max_queue", "max_queue_tokens"):
            value = getattr(self, name)
            check(value is None or value >= 1, name, value, "must be at least 1")
        check(
            self.num_gateway_replicas >= 1,
            "num_gateway_replicas",
            self.num_gateway_replicas,
            "must be at least 1",
        )
        for name in _LIMITS:
            value = getattr(self, name)
            check(value > 0, name, value, "must be above 0")
        for name in ("drain_lead_s", "drain_timeout_s"):
            value = getattr(self, name)
            check(0 <= value < float("inf"), name, value, "must not be negative or infinite")
        for name in ("api_keys", "admin_keys"):
            check(all(getattr(self, name)), name, "", "must not be empty")
            object.__setattr__(self, name, tuple(map(hash_key, getattr(self, name))))
        for name in ("key_max_concurrent", "key_requests_per_minute", "key_tokens_per_minute"):
            value = getattr(self, name)
            check(value is None or value > 0, name, value, "must be above 0")
        pair = "needs both tls_cert and tls_key"
        check((self.tls_cert is None) is (self.tls_key is None), "tls_key", self.tls_key, pair)
        needs = "needs tls_cert and tls_key"
        has_ca = self.tls_client_ca is not None
        check(not has_ca or self.has_tls, "tls_client_ca", self.tls_client_ca, needs)
        is_name = _METRICS_PREFIX.fullmatch(self.metrics_prefix) is not None
        rule = "must be letters, digits, _ and :, and not begin with a digit"
        check(is_name, "metrics_prefix", self.metrics_prefix, rule)
        check_choice("routing_policy", self.routing_policy, RoutingPolicyName)
        check(
            is_loopback(self.host) or self.asks_for_keys or self.allow_unauthenticated,
            "host",
            self.host,
            "is public: give --api-key or --api-key-file, or say --allow-unauthenticated",
        )
        check(
            is_loopback(self.admin_host) or self.asks_for_admin_keys,
            "admin_host",
            self.admin_host,
            "is public: give --admin-key or --admin-key-file",
        )

    @property
    def has_tls(self) -> bool:
        """All ports speak TLS."""
        return self.tls_cert is not None

    @property
    def asks_for_keys(self) -> bool:
        """Clients must present a key."""
        return bool(self.api_keys) or self.api_key_file is not None

    @property
    def asks_for_admin_keys(self) -> bool:
        """The admin ports have keys of their own."""
        return bool(self.admin_keys) or self.admin_key_file is not None
