"""Configuration of the gateway: ports, keys, TLS and request limits."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from typing import Literal

from cluster.config.api_keys import hash_key
from cluster.config.option_metadata import bare, flag
from cluster.core.checks import (
    check,
    check_choice,
    check_each,
    is_at_least_1,
    is_not_negative,
    is_positive,
)

_LIMITS = (
    "max_body_bytes max_json_depth max_batch_prompts max_choices max_stop_strings max_stop_chars "
    "request_timeout_s key_max_concurrent key_requests_per_minute key_tokens_per_minute "
    "state_max_bytes state_max_objects"
)
_ROOT_PATH = re.compile("(/[A-Za-z0-9._~-]+)*")
_METRICS_PREFIX = re.compile("[a-zA-Z_:][a-zA-Z0-9_:]*")
VLLM_PREFIX = "vllm:"
"""Prefix of vLLM's names, which ``vllm_metric_names`` adds."""
ShutdownStage = Literal["lead", "refuse", "fail"]
"""Stages of a gateway's shutdown: ``lead`` serves but is not ready, ``refuse`` also rejects new
requests, ``fail`` also fails the running requests."""
MAX_BODY_BYTES = 8 * 1024 * 1024
"""Default maximum size of an HTTP request body, in bytes."""
MAX_TTL_S = 10 * 365 * 24 * 3600
"""Maximum of ``state_ttl_s`` (lifetime of stored objects), in seconds."""
RoutingPolicyName = Literal["kv", "least-loaded", "round-robin"]


def is_loopback(host: str) -> bool:
    """Return whether only this host can reach a server that listens on ``host``.

    An empty ``host`` means all interfaces.
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_network(text: str) -> bool:
    """Return whether a text is an IP address, a network, or ``*`` for all."""
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return text == "*"
    return True


def reachable_host(host: str) -> str:
    """Return the host part of a URL at which this host reaches a server listening on ``host``."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewaySection:
    """Ports, keys, TLS and request limits of the gateway."""

    host: str = "127.0.0.1"
    """Network interface on which HTTP and gRPC listen."""
    port: int = 8000
    """HTTP port; 0 takes a free one."""
    grpc_port: int = 50051
    """gRPC port; 0 takes a free one."""
    admin_port: int | None = None
    """HTTP port of the admin service; by default 8001, or a free one if that is in use."""
    admin_grpc_port: int | None = None
    """gRPC port of the admin service; by default 50052, or a free one if that is in use."""
    serve_proxy: int | None = field(default=None, metadata=bare("8002"))
    """Start Ray Serve's own HTTP proxy on this port, for other Serve applications. 0 takes a free
    port, the option without a value takes 8002; by default the proxy does not run."""
    root_path: str = ""
    """Path prefix at which a reverse proxy serves the HTTP port, such as /llm."""
    forwarded_allow_ips: tuple[str, ...] = ("127.0.0.1",)
    """Addresses and networks of proxies whose X-Forwarded headers are trusted, separated by commas;
    ``*`` trusts all."""
    num_gateway_replicas: int = 1
    """Number of gateway replicas; replicas on one host share the same ports."""
    routing_policy: RoutingPolicyName = "kv"
    """How a gateway picks the attention worker of a request; ``kv``: by cached prefixes and
    load."""
    api_keys: tuple[str, ...] = field(default=(), repr=False, metadata=flag("--api-key"))
    """Keys that clients must send, kept as digests. Without this option and ``api_key_file``, no
    key is required."""
    api_key_file: str | None = None
    """File of API keys that clients must send: one per line, or YAML with names and limits. Changes
    take effect while serving."""
    key_max_concurrent: int | None = 256
    """Maximum concurrent requests of one API key at each gateway replica, unless the file sets
    one."""
    key_requests_per_minute: float | None = None
    """Maximum requests of one API key per minute at each gateway replica; by default no limit."""
    key_tokens_per_minute: float | None = None
    """Maximum prompt and output tokens of one API key per minute at each gateway replica; by
    default no limit."""
    admin_host: str = "127.0.0.1"
    """Network interface on which both admin ports listen."""
    admin_keys: tuple[str, ...] = field(default=(), repr=False, metadata=flag("--admin-key"))
    """Keys for the admin ports, kept as digests. Without admin keys, these ports accept the API
    keys and listen on loopback only."""
    admin_key_file: str | None = None
    """File of the keys for the admin ports, in the format of ``api_key_file``."""
    tls_cert: str | None = None
    """PEM file of the server certificate with its chain; enables TLS on every port."""
    tls_key: str | None = None
    """PEM file of the certificate's private key, not encrypted."""
    tls_client_ca: str | None = None
    """PEM file of certificate authorities, one of which must have signed the certificate of each
    client (mutual TLS)."""
    allow_unauthenticated: bool = False
    """Allow a public ``host`` without API keys, so that everyone who reaches it can use it, and a
    Ray cluster of several hosts that accepts calls without a token."""
    public_metrics: bool = False
    """Serve ``/metrics`` without an API key."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may call from a browser, separated by commas; ``*`` allows all."""
    debug_headers: bool = False
    """Name the gateway replica in a header of each response."""
    trust_request_chat_template: bool = False
    """Allow chat templates in requests; each runs in a process with limits of time and memory."""
    max_body_bytes: int = MAX_BODY_BYTES
    """Maximum size of an HTTP request body."""
    max_json_depth: int = 64
    """Maximum nesting depth of a JSON request body."""
    max_batch_prompts: int = 256
    """Maximum number of prompts in one completion request."""
    max_n: int = 16
    """Maximum number of choices (n) for one prompt, at most 128."""
    max_choices: int = 512
    """Maximum number of prompts times choices in one request."""
    max_stop_strings: int = 16
    """Maximum number of stop strings in one request."""
    max_stop_chars: int = 256
    """Maximum number of characters of one stop string."""
    max_logprobs: int = 20
    """Maximum number of alternatives that logprobs report for a token."""
    max_cache_ttl_s: float = 3600.0
    """Maximum time that a request may protect its KV from eviction with its field cache_ttl."""
    max_queue: int = 1024
    """Maximum number of requests at each gateway replica, running and waiting."""
    max_queue_tokens: int | None = None
    """Maximum sum of the prompt and output tokens of these requests; by default ``max_queue`` times
    the context length."""
    max_queue_wait_s: float = 3.0
    """Expected wait above which new requests of an API key are rejected; 0 disables the limit. Once
    a queue has existed for longer than this value, the limit falls to a third of the value.
    Requests with a priority above 0 wait without this limit."""
    request_timeout_s: float = 600.0
    """Maximum duration of a request, including its time in queues."""
    state_dir: str | None = None
    """Folder in which gateways store responses, files and batches of clients; it must be shared by
    all of them. By default nothing is stored."""
    state_ttl_s: float = 30 * 24 * 3600.0
    """Time after which a stored object is deleted."""
    state_max_bytes: int = 1 << 30
    """Maximum total size of the stored objects of one kind for one API key."""
    state_max_objects: int = 10_000
    """Maximum number of stored objects of one kind for one API key."""
    drain_lead_s: float = 5.0
    """Time after SIGTERM in which the gateway serves requests but reports not ready, so that load
    balancers stop sending."""
    drain_timeout_s: float = 120.0
    """Time after ``drain_lead_s`` for running requests to finish, while new ones are rejected."""
    metrics_all_experts: bool = False
    """Export the token counts of every expert in ``/metrics``, not only of each layer's busiest."""
    metrics_prefix: str = "expertmesh:"
    """Prefix of the metric names in ``/metrics``."""
    vllm_metric_names: bool = False
    """Also export metrics under the names that vLLM uses, for its dashboards."""

    def __post_init__(self) -> None:
        taken = set[int]()
        for name in ("port", "grpc_port", "admin_port", "admin_grpc_port", "serve_proxy"):
            value = getattr(self, name)
            if value is None:
                continue
            check(0 <= value <= 65535, name, value, "must be a port number (0 to 65535)")
            check(value == 0 or value not in taken, name, value, "must differ from other ports")
            taken.add(value)
        check(1 <= self.max_n <= 128, "max_n", self.max_n, "must be 1 to 128")
        counts = "max_queue max_queue_tokens num_gateway_replicas"
        check_each(self, counts, is_at_least_1, "must be at least 1")
        check_each(self, _LIMITS, is_positive, "must be above 0")
        ttl = self.state_ttl_s
        check(1 <= ttl <= MAX_TTL_S, "state_ttl_s", ttl, f"must be 1 to {MAX_TTL_S}")
        amounts = "max_logprobs drain_lead_s drain_timeout_s max_queue_wait_s max_cache_ttl_s"
        check_each(self, amounts, is_not_negative, "must not be negative")
        for name in ("api_keys", "admin_keys"):
            check(all(getattr(self, name)), name, "", "must not be empty")
            object.__setattr__(self, name, tuple(map(hash_key, getattr(self, name))))
        pair = "needs both tls_cert and tls_key"
        check((self.tls_cert is None) is (self.tls_key is None), "tls_key", self.tls_key, pair)
        needs = "needs tls_cert and tls_key"
        has_ca = self.tls_client_ca is not None
        check(not has_ca or self.has_tls, "tls_client_ca", self.tls_client_ca, needs)
        rule = "cannot be used with tls_client_ca: it requests no client certificates"
        check(not has_ca or self.serve_proxy is None, "serve_proxy", self.serve_proxy, rule)
        rule = "must be empty or /, a name, and so on, without / at its end"
        is_path = _ROOT_PATH.fullmatch(self.root_path) is not None
        check(is_path, "root_path", self.root_path, rule)
        for address in self.forwarded_allow_ips:
            rule = "must be an address, a network or *"
            check(_is_network(address), "forwarded_allow_ips", address, rule)
        is_name = _METRICS_PREFIX.fullmatch(self.metrics_prefix) is not None
        rule = "must be letters, digits, _ and :, and not begin with a digit"
        check(is_name, "metrics_prefix", self.metrics_prefix, rule)
        has_both = self.vllm_metric_names and self.metrics_prefix == VLLM_PREFIX
        rule = "must differ from the prefix of vllm_metric_names"
        check(not has_both, "metrics_prefix", self.metrics_prefix, rule)
        check_choice("routing_policy", self.routing_policy, RoutingPolicyName)
        check(
            is_loopback(self.host) or self.requires_keys or self.allow_unauthenticated,
            "host",
            self.host,
            "is public: give --api-key or --api-key-file, or set --allow-unauthenticated",
        )
        check(
            is_loopback(self.admin_host) or self.requires_admin_keys,
            "admin_host",
            self.admin_host,
            "is public: give --admin-key or --admin-key-file",
        )
        rule = "must not be empty: 0.0.0.0 is every interface"
        for name in ("host", "admin_host"):
            check(bool(getattr(self, name)), name, "", rule)

    @property
    def public_ports(self) -> dict[str, int]:
        """Ports for clients, by the name of the setting."""
        ports = {"port": self.port, "grpc_port": self.grpc_port}
        return ports if self.serve_proxy is None else {**ports, "serve_proxy": self.serve_proxy}

    @property
    def has_tls(self) -> bool:
        """Whether all ports use TLS."""
        return self.tls_cert is not None

    @property
    def requires_keys(self) -> bool:
        """Whether clients must present an API key."""
        return bool(self.api_keys) or self.api_key_file is not None

    @property
    def requires_admin_keys(self) -> bool:
        """Whether the admin ports have keys of their own."""
        return bool(self.admin_keys) or self.admin_key_file is not None
