"""Configuration: one frozen dataclass per component, composed into ``ClusterConfig``.

Values are checked where they are built; a rule that is broken raises ``ConfigError`` with the
field, the value and the rule. ``to_dict`` and ``from_dict`` carry a config between processes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from cluster.errors import ConfigError

Mode = Literal["disaggregated", "local"]
Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16"]
Transport = Literal["auto", "sockets", "collective"]
CombineMode = Literal["sum", "per_slot"]


def check(ok: bool, name: str, value: object, rule: str) -> None:
    """Raise ``ConfigError`` unless ``ok``."""
    if not ok:
        raise ConfigError(name, value, rule)


def _check_choice(name: str, value: str, kind: Any) -> None:
    choices = get_args(kind)
    check(value in choices, name, value, f"must be one of {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """Which checkpoint is served, and how its numbers are kept."""

    path: str
    """Local folder of the checkpoint (a hub id is resolved to one before this is built)."""
    served_model_name: str
    """Name that clients use."""
    dtype: DType = "auto"
    """Compute type; ``auto`` takes the checkpoint's own."""
    max_model_len: int | None = None
    """Context limit in tokens; None takes the checkpoint's ``max_position_embeddings``."""
    chat_template: str | None = None
    """Jinja text that replaces the checkpoint's chat template."""

    def __post_init__(self) -> None:
        _check_choice("dtype", self.dtype, DType)
        check(bool(self.served_model_name), "served_model_name", "", "must not be empty")
        if self.max_model_len is not None:
            check(
                self.max_model_len >= 1, "max_model_len", self.max_model_len, "must be at least 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkersSection:
    """How many workers there are, and what each of them may use."""

    mode: Mode = "disaggregated"
    """``local`` is one attention worker that holds the experts too."""
    num_attention_workers: int = 1
    """Attention ranks."""
    num_expert_workers: int = 2
    """Expert ranks; 0 in local mode."""
    num_redundant_experts: int = 0
    """Spare expert slots per expert worker and bank."""
    recovery_slots: int = 0
    """Expert slots per expert worker and bank that are kept free for recovery."""
    device: Device = "auto"
    """``auto`` takes CUDA where every worker can have a share of a GPU."""
    cpus_per_worker: float | None = None
    """CPUs that Ray sets aside for a worker; None shares the cluster's CPUs equally."""
    gpus_per_worker: float | None = None
    """GPUs that Ray sets aside for a worker, fractions allowed; None is 1 on CUDA, else 0."""
    placement_file: str | None = None
    """Path of a placement to use instead of the contiguous one."""

    def __post_init__(self) -> None:
        _check_choice("mode", self.mode, Mode)
        _check_choice("device", self.device, Device)
        at_least_one = (
            ("num_attention_workers", self.num_attention_workers),
            ("num_expert_workers", 1 if self.mode == "local" else self.num_expert_workers),
        )
        for name, value in at_least_one:
            check(value >= 1, name, value, "must be at least 1")
        for name, value in (
            ("num_redundant_experts", self.num_redundant_experts),
            ("recovery_slots", self.recovery_slots),
        ):
            check(value >= 0, name, value, "must not be negative")
        if self.mode == "local":
            check(
                self.num_attention_workers == 1,
                "num_attention_workers",
                self.num_attention_workers,
                "must be 1 in local mode",
            )
        if self.cpus_per_worker is not None:
            cpus = self.cpus_per_worker
            check(cpus > 0, "cpus_per_worker", cpus, "must be > 0")
        if self.gpus_per_worker is not None:
            check(
                self.gpus_per_worker >= 0, "gpus_per_worker", self.gpus_per_worker, "must be >= 0"
            )

    @property
    def num_expert_ranks(self) -> int:
        """Expert ranks that are really started."""
        return 0 if self.mode == "local" else self.num_expert_workers

    @property
    def num_workers(self) -> int:
        """All workers of both pools."""
        return self.num_attention_workers + self.num_expert_ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSection:
    """Budgets and switches of one attention worker's engine."""

    block_size_tokens: int = 16
    """Tokens in one KV block."""
    kv_cache_bytes: int | None = None
    """KV memory of each attention worker; None is room for 16 full contexts, 64 MiB to 1 GiB."""
    max_num_seqs: int = 64
    """Sequences in one step of one attention worker."""
    max_num_batched_tokens: int = 512
    """Rows (tokens) in one step of one attention worker."""
    max_waiting: int = 1024
    """Requests of one attention worker that may wait."""
    combine_mode: CombineMode = "sum"
    """``per_slot`` makes results independent of the placement, at the price of more traffic."""
    seed: int = 0
    """Base of the seeds drawn for requests that bring none."""

    def __post_init__(self) -> None:
        _check_choice("combine_mode", self.combine_mode, CombineMode)
        for name in ("block_size_tokens", "max_num_seqs", "max_num_batched_tokens", "max_waiting"):
            value = getattr(self, name)
            check(value >= 1, name, value, "must be at least 1")
        check(
            self.max_num_batched_tokens >= self.max_num_seqs,
            "max_num_batched_tokens",
            self.max_num_batched_tokens,
            f"must be at least max_num_seqs ({self.max_num_seqs})",
        )
        if self.kv_cache_bytes is not None:
            check(
                self.kv_cache_bytes > 0, "kv_cache_bytes", self.kv_cache_bytes, "must be positive"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TransportSection:
    """The data plane and the detection of failures."""

    transport: Transport = "auto"
    """``auto`` is ``collective`` on CUDA and ``sockets`` on CPUs."""
    detection_limit_s: float = 2.0
    """A worker that makes no progress and no heartbeat for so long is declared lost."""
    heartbeat_s: float = 0.5
    """Time between two heartbeats of a worker."""
    connect_timeout_s: float = 10.0
    """Limit for opening one edge, handshake included."""
    step_timeout_s: float = 60.0
    """Limit for one wait on a peer within a step, when nothing else reports its loss."""

    def __post_init__(self) -> None:
        _check_choice("transport", self.transport, Transport)
        for name in ("detection_limit_s", "heartbeat_s", "connect_timeout_s", "step_timeout_s"):
            value = getattr(self, name)
            check(value > 0, name, value, "must be positive")
        check(
            self.heartbeat_s < self.detection_limit_s,
            "heartbeat_s",
            self.heartbeat_s,
            f"must be below detection_limit_s ({self.detection_limit_s})",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewaySection:
    """The front door."""

    host: str = "127.0.0.1"
    """Interface of HTTP and gRPC."""
    port: int = 8000
    """HTTP port."""
    grpc_port: int = 50051
    """gRPC port."""
    num_gateway_replicas: int = 1
    """Gateway copies behind Ray Serve."""
    api_keys: tuple[str, ...] = ()
    """Keys that clients must present; empty means that none is asked for."""
    allow_unauthenticated: bool = False
    """Allow a public host without keys."""
    max_body_bytes: int = 8 * 1024 * 1024
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
    """Requests that a replica holds at once."""
    request_timeout_s: float = 600.0
    """Longest life of a request."""

    def __post_init__(self) -> None:
        for name in ("port", "grpc_port"):
            value = getattr(self, name)
            check(0 <= value <= 65535, name, value, "must be a port number (0 to 65535)")
        check(
            self.port == 0 or self.port != self.grpc_port,
            "grpc_port",
            self.grpc_port,
            f"must differ from port ({self.port})",
        )
        check(1 <= self.max_n <= 128, "max_n", self.max_n, "must be 1 to 128")
        check(
            self.num_gateway_replicas >= 1,
            "num_gateway_replicas",
            self.num_gateway_replicas,
            "must be at least 1",
        )
        is_public = self.host not in ("127.0.0.1", "localhost", "::1")
        check(
            not is_public or bool(self.api_keys) or self.allow_unauthenticated,
            "host",
            self.host,
            "is public: give --api-key, or say --allow-unauthenticated",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Everything one expertmesh cluster is started with."""

    model: ModelSection
    """Checkpoint."""
    workers: WorkersSection = field(default_factory=WorkersSection)
    """Pools."""
    engine: EngineSection = field(default_factory=EngineSection)
    """Engine of each attention worker."""
    transport: TransportSection = field(default_factory=TransportSection)
    """Data plane and failure detection."""
    gateway: GatewaySection = field(default_factory=GatewaySection)
    """HTTP and gRPC."""
    cluster_token: str = field(default="", repr=False)
    """Shared secret of the workers' sockets, drawn at start."""

    def __post_init__(self) -> None:
        requests = self.gateway.max_queue * self.gateway.num_gateway_replicas
        check(
            self.workers.num_attention_workers <= requests,
            "num_attention_workers",
            self.workers.num_attention_workers,
            f"must not exceed the {requests} requests that are let in at once: "
            "more workers than can ever have work",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ClusterConfig:
        """Inverse of ``to_dict``. Raises ``ConfigError`` on unknown keys."""
        sections: dict[str, Any] = {
            "model": ModelSection,
            "workers": WorkersSection,
            "engine": EngineSection,
            "transport": TransportSection,
            "gateway": GatewaySection,
        }
        values: dict[str, Any] = {}
        for name, value in data.items():
            if name in sections:
                values[name] = _section_from_dict(sections[name], name, value)
            else:
                check(name == "cluster_token", name, value, "is not a section of the configuration")
                values[name] = value
        return cls(**values)

    def fingerprint(self) -> str:
        """Hash of all that must be equal on every worker (12 hex digits)."""
        shared = {
            "engine": dataclasses.asdict(self.engine),
            "dtype": self.model.dtype,
            "transport": self.transport.transport,
            "mode": self.workers.mode,
        }
        text = json.dumps(shared, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _section_from_dict(kind: Any, section: str, data: Mapping[str, Any]) -> Any:
    known = {f.name: f for f in dataclasses.fields(kind)}
    for key, value in data.items():
        check(key in known, f"{section}.{key}", value, "is not a known setting")
    values = {k: tuple(v) if k == "api_keys" else v for k, v in data.items()}
    return kind(**values)
