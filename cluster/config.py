"""Configuration: one frozen dataclass per component, composed into ``ClusterConfig``.

Values are checked where they are built; a rule that is broken raises ``ConfigError`` with the
field, the value and the rule. ``to_dict`` and ``from_dict`` carry a config between processes. The
gateway's section, the longest, is in ``cluster.gateway_config``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.config_checks import check, check_choice
from cluster.gateway_config import GatewaySection
from cluster.topology import Role

Mode = Literal["disaggregated", "colocated", "local", "auto"]
Device = Literal["auto", "cpu", "cuda"]
DeviceSpeed = Literal["given", "measured"]
DType = Literal["auto", "float32", "bfloat16"]
Transport = Literal["auto", "sockets", "collective"]
CombineMode = Literal["sum", "per_slot"]
NumMicroBatches = Literal["auto", 1, 2]


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
    """Context limit in tokens; None takes the checkpoint's own."""
    chat_template: str | None = None
    """Jinja text that replaces the checkpoint's chat template."""

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DType)
        check(bool(self.served_model_name), "served_model_name", "", "must not be empty")
        if self.max_model_len is not None:
            check(
                self.max_model_len >= 1, "max_model_len", self.max_model_len, "must be at least 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkersSection:
    """How many workers there are, and what each of them may use."""

    mode: Mode = "disaggregated"
    """``colocated``: every worker runs attention and holds experts; ``local``: one holds all;
    ``auto``: one of the first two, chosen before anything is started."""
    mode_reason: str = ""
    """Why ``auto`` chose this mode; empty where it was asked for."""
    num_attention_workers: int | None = None
    """Attention ranks; None is 1, in colocated mode ``num_expert_workers``."""
    num_expert_workers: int = 2
    """Expert ranks, in colocated mode all workers; does not count in local mode."""
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
    load_profile: str | None = None
    """Path of a load profile to plan the first placement for."""
    device_speed: DeviceSpeed = "given"
    """Where the speeds come from that expert load is in proportion to: the labels of the workers'
    nodes, or each worker measures its own when it has loaded."""
    paced_slot_us: float = 0.0
    """For benchmarks: experts compute nothing and wait so long for each activated slot, and"""
    paced_token_us: float = 0.0
    """so long for each (row, expert) pair; both 0: they compute."""

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, Mode)
        check_choice("device", self.device, Device)
        check_choice("device_speed", self.device_speed, DeviceSpeed)
        at_least_one = (
            ("num_attention_workers", self.num_attention_ranks),
            ("num_expert_workers", 1 if self.mode == "local" else self.num_expert_workers),
        )
        for name, value in at_least_one:
            check(value >= 1, name, value, "must be at least 1")
        for name, value in (
            ("num_redundant_experts", self.num_redundant_experts),
            ("recovery_slots", self.recovery_slots),
        ):
            check(value >= 0, name, value, "must not be negative")
        only = "must not be given beside placement_file: that is a placement already"
        both = self.placement_file is not None and self.load_profile is not None
        check(not both, "load_profile", self.load_profile, only)
        for name, time_us in (
            ("paced_slot_us", self.paced_slot_us),
            ("paced_token_us", self.paced_token_us),
        ):
            check(time_us >= 0, name, time_us, "must not be negative")
        attention, experts = self.num_attention_ranks, self.num_expert_workers
        if self.mode == "local":
            check(attention == 1, "num_attention_workers", attention, "must be 1 in local mode")
        elif self.mode == "colocated":
            rule = f"must be left out or equal num_expert_workers ({experts}) in colocated mode"
            check(attention == experts, "num_attention_workers", attention, rule)
        if self.cpus_per_worker is not None:
            cpus = self.cpus_per_worker
            check(cpus > 0, "cpus_per_worker", cpus, "must be > 0")
        if self.gpus_per_worker is not None:
            check(
                self.gpus_per_worker >= 0, "gpus_per_worker", self.gpus_per_worker, "must be >= 0"
            )

    @property
    def num_attention_ranks(self) -> int:
        """Workers that hold requests."""
        if self.num_attention_workers is not None:
            return self.num_attention_workers
        return self.num_expert_workers if self.mode == "colocated" else 1

    @property
    def pools(self) -> dict[Role, int]:
        """Workers of each role that are started."""
        match self.mode:
            case "colocated":
                return {"colocated": self.num_expert_workers}
            case "local":
                return {"attention": 1}
            case _:
                return {"attention": self.num_attention_ranks, "expert": self.num_expert_workers}

    @property
    def num_workers(self) -> int:
        """All workers."""
        return sum(self.pools.values())


_OTLP_URL = re.compile(r"https?://[^\s/?#@]+:\d{1,5}/?")
_DEFAULT_KV_CONTEXTS = 16
_MIN_DEFAULT_KV_BYTES = 64 * 1024**2
_MAX_DEFAULT_KV_BYTES = 1024**3


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
    itl_target_ms: float | None = None
    """Longest step while anyone decodes: prompts are cut so that no step takes longer. None cuts
    them by ``max_num_batched_tokens`` alone."""
    max_waiting: int = 1024
    """Sequences (choices of requests) of one attention worker that may wait."""
    max_waiting_tokens: int | None = None
    """Prompt tokens of one attention worker that may wait; None leaves it to ``max_waiting``."""
    enable_prefix_caching: bool = True
    """Keep the KV of past requests for others that begin with the same tokens."""
    kv_fetch_limit_s: float = 2.0
    """Longest time that a request waits for KV blocks of another attention worker; 0: none are
    fetched."""
    combine_mode: CombineMode = "sum"
    """``per_slot`` makes results independent of the placement, at the price of more traffic."""
    deterministic: bool = False
    """A request's tokens and logprobs are the same bits in any company, layout and history, at the
    price of speed. Implies ``per_slot``, CPUs and one compute thread a worker."""
    num_micro_batches: NumMicroBatches = "auto"
    """Parts of a step that are in flight at once; ``auto`` lets the leader choose for each step."""
    micro_batch_decode_threshold: int = 128
    """Rows of the busiest attention rank from which ``auto`` splits a step of decodes only."""
    micro_batch_prefill_threshold: int = 256
    """The same for a step that has prompt rows."""
    seed: int = 0
    """Base of the seeds drawn for requests that bring none."""

    def __post_init__(self) -> None:
        check_choice("combine_mode", self.combine_mode, CombineMode)
        check_choice("num_micro_batches", self.num_micro_batches, NumMicroBatches)
        for name in ("micro_batch_decode_threshold", "micro_batch_prefill_threshold"):
            value = getattr(self, name)
            check(value >= 2, name, value, "must be at least 2: one row cannot be split")
        if self.deterministic:
            object.__setattr__(self, "combine_mode", "per_slot")
        for name in ("block_size_tokens", "max_num_seqs", "max_num_batched_tokens", "max_waiting"):
            value = getattr(self, name)
            check(value >= 1, name, value, "must be at least 1")
        check(
            self.max_num_batched_tokens >= self.max_num_seqs,
            "max_num_batched_tokens",
            self.max_num_batched_tokens,
            f"must be at least max_num_seqs ({self.max_num_seqs})",
        )
        limit_s = self.kv_fetch_limit_s
        check(limit_s >= 0, "kv_fetch_limit_s", limit_s, "must not be negative")
        for name in ("itl_target_ms", "max_waiting_tokens"):
            value = getattr(self, name)
            check(value is None or value > 0, name, value, "must be positive")
        if self.kv_cache_bytes is not None:
            check(
                self.kv_cache_bytes > 0, "kv_cache_bytes", self.kv_cache_bytes, "must be positive"
            )

    def num_kv_blocks(self, bytes_per_token: int, max_model_len: int) -> int:
        """KV blocks of one attention worker.

        Raises ``ConfigError`` if its memory does not hold even one.
        """
        each = bytes_per_token * self.block_size_tokens
        budget = self.kv_cache_bytes
        if budget is None:
            contexts = _DEFAULT_KV_CONTEXTS * -(-max_model_len // self.block_size_tokens) * each
            budget = min(max(contexts, _MIN_DEFAULT_KV_BYTES), _MAX_DEFAULT_KV_BYTES)
        rule = f"must hold at least one block of {each} bytes"
        check(budget >= each, "kv_cache_bytes", budget, rule)
        return budget // each


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
        check_choice("transport", self.transport, Transport)
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
class ObservabilitySection:
    """What is written down of steps and told of requests."""

    trace_dir: str | None = None
    """Folder, on each worker's own host, for a timeline of its steps; None writes none."""
    trace_max_bytes: int = 64 * 1024 * 1024
    """Size at which a worker begins a new file; it keeps the one before."""
    otlp_endpoint: str | None = None
    """URL of an OpenTelemetry collector (OTLP over gRPC) for traces of requests; None: none."""
    trace_content: bool = False
    """Prompts and outputs are in these traces."""

    def __post_init__(self) -> None:
        url = self.otlp_endpoint
        rule = "must be http://HOST:PORT or https://HOST:PORT"
        check(url is None or _OTLP_URL.fullmatch(url) is not None, "otlp_endpoint", url, rule)
        has_place = url is not None or not self.trace_content
        check(has_place, "trace_content", self.trace_content, "needs otlp_endpoint")
        check(self.trace_dir != "", "trace_dir", "", "must not be empty")
        check(
            self.trace_max_bytes >= 1024, "trace_max_bytes", self.trace_max_bytes, "must be >= 1024"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RebalanceSection:
    """When experts move to where the load is."""

    enable_eplb: bool = False
    """Rebalance by itself; else only when told to."""
    interval_s: float = 30.0
    """Shortest time between the end of one change and the next by itself."""
    horizon_s: float = 300.0
    """Time for which a load is taken to stay: what it gains in it must exceed what moving costs."""
    max_move_fraction: float = 0.1
    """Share of all expert slots that one change may fill."""
    bytes_per_s: float = 100e6
    """Rate at which each worker takes weights in while it serves."""
    limit_s: float = 120.0
    """Time for each stage of a change, after which it is given up."""

    def __post_init__(self) -> None:
        for name in ("interval_s", "horizon_s", "bytes_per_s", "limit_s"):
            value = getattr(self, name)
            check(value > 0, f"rebalance_{name}", value, "must be positive")
        share = self.max_move_fraction
        check(0 <= share <= 1, "rebalance_max_move_fraction", share, "must be from 0 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadSection:
    """How expert load is followed."""

    report_s: float = 2.0
    """Time between two reports of an attention worker to the controller."""
    window_s: float = 10.0
    """Length of a window."""
    num_windows: int = 60
    """Windows that are kept."""
    half_life_s: float = 60.0
    """Time with load after which a window weighs half in the exponential average."""

    def __post_init__(self) -> None:
        for name in ("report_s", "window_s", "half_life_s"):
            value = getattr(self, name)
            check(value > 0, name, value, "must be positive")
        check(self.num_windows >= 1, "num_windows", self.num_windows, "must be at least 1")


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
    observability: ObservabilitySection = field(default_factory=ObservabilitySection)
    """Traces of steps and of requests."""
    load: LoadSection = field(default_factory=LoadSection)
    """Expert load."""
    rebalance: RebalanceSection = field(default_factory=RebalanceSection)
    """Changes of the placement while serving."""
    gateway: GatewaySection = field(default_factory=GatewaySection)
    """HTTP and gRPC."""
    cluster_token: str = field(default="", repr=False)
    """Shared secret of the workers' sockets, drawn at start."""

    def __post_init__(self) -> None:
        if self.engine.deterministic:
            device = self.workers.device
            check(device != "cuda", "device", device, "must be cpu with deterministic")
            workers = dataclasses.replace(self.workers, device="cpu")
            object.__setattr__(self, "workers", workers)
        requests = self.gateway.max_queue * self.gateway.num_gateway_replicas
        check(
            self.workers.num_attention_ranks <= requests,
            "num_attention_workers",
            self.workers.num_attention_ranks,
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
            "observability": ObservabilitySection,
            "load": LoadSection,
            "rebalance": RebalanceSection,
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
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    return kind(**values)
