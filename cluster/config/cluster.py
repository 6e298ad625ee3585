"""Configuration: one frozen dataclass per component, composed into ``ClusterConfig``.

Values are checked in ``__post_init__``; an invalid value raises ``ConfigError`` with the field, the
value and the rule. ``to_dict`` and ``from_dict`` carry a config between processes. This module has
the engine's section; each other section has a module of its own in this folder.

The options of ``serve`` are made from the fields: the docstring below a field is the help of its
option; the field's type, name and default determine how its text is parsed and shown. ``INTERNAL``
fields have no option; ``flag`` gives an option another name than the field's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_origin, get_type_hints

import msgspec

from cluster.config.autoscale import AutoscaleSection
from cluster.config.expert_load import LoadSection, RebalanceSection
from cluster.config.gateway import GatewaySection
from cluster.config.kv_cache import KvCacheDType
from cluster.config.kv_events import KvEventsSection
from cluster.config.kv_tiers import KvTiersSection
from cluster.config.lora import LoraSection
from cluster.config.model import ModelSection
from cluster.config.observability import ObservabilitySection
from cluster.config.option_metadata import INTERNAL
from cluster.config.speculation import SpeculationSection
from cluster.config.transport import TransportSection
from cluster.config.workers import WorkersSection
from cluster.core.checks import (
    check,
    check_choice,
    check_each,
    is_at_least_1,
    is_not_negative,
    is_positive,
)
from cluster.core.errors import ConfigError
from cluster.core.fleets import namespace_of

CombineMode = Literal["sum", "per_slot"]
Deterministic = Literal["auto", "on", "off"]
NumMicroBatches = Literal["auto", 1, 2]

_STEP_TOKENS = 512
GPU_STEP_TOKENS = 2048
"""Default number of tokens in one step of a GPU. With about 850 tokens an H100 computes the experts
of OLMoE-1B-7B as long as it reads their weights, with 1,600 those of Qwen3-30B-A3B (460 TFLOPS and
2.7 TB/s, docs/results/gpu.md); beyond, a larger step gains little."""
_ALL_STEP_TOKENS = 4096
"""Default number of tokens in one step of all GPUs, for which expert workers reserve memory."""
_AT_LEAST_1 = "must be at least 1"
_DEFAULT_KV_CONTEXTS = 16
_MIN_DEFAULT_KV_BYTES = 64 * 1024**2
_MAX_DEFAULT_KV_BYTES = 1024**3


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSection:
    """Limits and switches of the engine of one attention worker."""

    block_size_tokens: int = field(default=16, metadata=INTERNAL)
    """Number of tokens in one KV block."""
    kv_cache_bytes: int | None = None
    """KV cache size of each attention worker, for example 512M. The default on a GPU is the rest of
    ``gpu_memory_utilization``, on CPUs the size of 16 full contexts within 64 MiB to 1 GiB."""
    gpu_memory_utilization: float = 0.9
    """Share of a worker's GPU for weights, steps and KV. Without effect on KV if
    ``kv_cache_bytes`` is set."""
    kv_cache_dtype: KvCacheDType = "auto"
    """Data type of the KV cache: ``auto`` takes the model's; ``fp8`` (e4m3 with a scale for each
    vector) holds about twice as many tokens as bfloat16 with less accuracy."""
    max_num_seqs: int = 64
    """Maximum number of sequences in one step of each attention worker."""
    max_num_batched_tokens: int | None = None
    """Maximum number of tokens in one step of each attention worker; by default 512 on CPUs and,
    on GPUs, 4096 divided by the number of attention workers, within 512 and 2048."""
    itl_target_ms: float | None = None
    """Target duration of a step while a request decodes: prompts are split into chunks small enough
    for it. By default only ``max_num_batched_tokens`` limits the chunks."""
    max_waiting: int = 1024
    """Maximum number of sequences that may wait at each attention worker; a choice is a
    sequence."""
    max_waiting_tokens: int | None = None
    """Maximum number of prompt tokens that may wait at each attention worker; by default no
    limit."""
    enable_prefix_caching: bool = True
    """Reuse the KV of past requests for requests that begin with the same tokens."""
    kv_kept_share: float = 0.5
    """Share of the KV blocks that requests may protect from eviction with their field cache_ttl,
    divided equally among the API keys."""
    num_cached_states: int = 32
    """Number of recurrent states that cache prefixes on each attention worker, in addition to three
    for each of ``max_num_seqs`` (two without prefix caching); only for models that have them."""
    kv_fetch_limit_s: float = 2.0
    """Maximum time that a request waits for KV blocks from another attention worker, after which it
    computes them; 0 disables fetches."""
    combine_mode: CombineMode = field(default="sum", metadata=INTERNAL)
    """Form in which expert outputs return to attention: ``sum`` of a row's outputs on a worker, or
    ``per_slot``, each output by itself, which makes results independent of the placement, with more
    traffic. Exact generations with several expert ranks always use ``per_slot``.
    """
    deterministic: Deterministic = "auto"
    """Make tokens and logprobs bitwise independent of batch, layout and history: ``auto`` if all
    workers support it; ``on`` requires CPUs, and the start fails unless all workers do."""
    num_micro_batches: NumMicroBatches = "auto"
    """Number of micro-batches of a step. With 2, attention computes one while experts compute the
    other; ``auto`` uses 2 in large enough steps."""
    micro_batch_decode_threshold: int = 64
    """Rows of the busiest attention worker from which ``auto`` splits a step without prompts."""
    micro_batch_prefill_threshold: int = field(default=256, metadata=INTERNAL)
    """Rows of the busiest attention rank from which ``num_micro_batches`` ``auto`` splits a step
    that has prompt rows.
    """
    enforce_eager: bool = False
    """Run decode steps on a GPU without CUDA graphs."""
    seed: int = 0
    """Seed from which the seeds of requests without one are derived; 0 selects random seeds."""

    def __post_init__(self) -> None:
        check_choice("kv_cache_dtype", self.kv_cache_dtype, KvCacheDType)
        check_choice("combine_mode", self.combine_mode, CombineMode)
        check_choice("num_micro_batches", self.num_micro_batches, NumMicroBatches)
        check_choice("deterministic", self.deterministic, Deterministic)
        thresholds = "micro_batch_decode_threshold micro_batch_prefill_threshold"
        check_each(
            self, thresholds, lambda n: n >= 2, "must be at least 2: one row cannot be split"
        )
        check_each(self, "block_size_tokens max_num_seqs max_waiting", is_at_least_1, _AT_LEAST_1)
        budget = self.max_num_batched_tokens
        check(budget is None or budget >= 1, "max_num_batched_tokens", budget, _AT_LEAST_1)
        check(
            self.step_tokens >= self.max_num_seqs,
            "max_num_batched_tokens",
            budget,
            f"must be at least max_num_seqs ({self.max_num_seqs})",
        )
        check_each(
            self, "kv_fetch_limit_s num_cached_states", is_not_negative, "must not be negative"
        )
        share = self.gpu_memory_utilization
        rule = "must be above 0 and at most 1"
        check(0 < share <= 1, "gpu_memory_utilization", share, rule)
        share, rule = self.kv_kept_share, "must be at least 0 and at most 1"
        check(0 <= share <= 1, "kv_kept_share", share, rule)
        limits = "itl_target_ms max_waiting_tokens kv_cache_bytes"
        check_each(self, limits, is_positive, "must be positive")

    @property
    def step_tokens(self) -> int:
        """Maximum number of tokens in one step, by default that of a CPU, but at least
        ``max_num_seqs``."""
        return self.max_num_batched_tokens or max(_STEP_TOKENS, self.max_num_seqs)

    def on_gpus(self, num_ranks: int = 1) -> Self:
        """Return the section with the defaults for GPUs. ``num_ranks``: attention workers."""
        if self.max_num_batched_tokens is not None:
            return self
        tokens = max(self.step_tokens, min(GPU_STEP_TOKENS, _ALL_STEP_TOKENS // num_ranks))
        return dataclasses.replace(self, max_num_batched_tokens=tokens)

    @property
    def num_states(self) -> int:
        """Number of recurrent states of one attention worker, if the model has such states.

        Each sequence has the states that a step reads and writes and, with prefix caching, the
        state after its last full block. The other states cache prefixes.
        """
        return (3 if self.enable_prefix_caching else 2) * self.max_num_seqs + self.num_cached_states

    def num_kv_blocks(self, bytes_per_token: int, max_model_len: int) -> int:
        """Return the number of KV blocks of one attention worker.

        If ``kv_cache_bytes`` is not set, the default size for CPUs applies. Raises ``ConfigError``
        if the memory is too small for one block.
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
class ClusterConfig:
    """The whole configuration of one expertmesh cluster."""

    model: ModelSection
    """Options of the checkpoint that is served."""
    workers: WorkersSection = field(default_factory=WorkersSection)
    """Options of the worker pools: sizes, and resources of each worker."""
    engine: EngineSection = field(default_factory=EngineSection)
    """Options of the engine of each attention worker."""
    speculation: SpeculationSection = field(default_factory=SpeculationSection)
    """Options of speculative decoding."""
    transport: TransportSection = field(default_factory=TransportSection)
    """Options of the data plane and of failure detection."""
    observability: ObservabilitySection = field(default_factory=ObservabilitySection)
    """Options of traces (of steps and requests) and logs."""
    load: LoadSection = field(default_factory=LoadSection)
    """Options of the measurement of expert load."""
    rebalance: RebalanceSection = field(default_factory=RebalanceSection)
    """Options of rebalancing: changes of the expert placement while serving."""
    autoscale: AutoscaleSection = field(default_factory=AutoscaleSection)
    """Options of the autoscaling of the pools."""
    lora: LoraSection = field(default_factory=LoraSection)
    """Options of LoRA adapters."""
    gateway: GatewaySection = field(default_factory=GatewaySection)
    """Options of the gateway's HTTP and gRPC servers."""
    kv_events: KvEventsSection = field(default_factory=KvEventsSection)
    """Options of events about cached KV blocks for the routers of other projects."""
    kv_tiers: KvTiersSection = field(default_factory=KvTiersSection)
    """Options of KV block copies outside the KV cache, in host memory and on disk."""
    cluster_token: str = field(default="", repr=False)
    """Shared secret of the cluster's processes, generated at the start."""
    fleet: str = ""
    """Name of the controller and the workers in Ray (see ``cluster.core.fleets``); empty for the
    first of several models, and where one model is served."""

    def __post_init__(self) -> None:
        if self.engine.deterministic == "on":
            device = self.workers.device
            check(device != "cuda", "device", device, "must be cpu with deterministic on")
            workers = dataclasses.replace(self.workers, device="cpu")
            object.__setattr__(self, "workers", workers)
        gpus = self.workers.gpus_per_worker or 0.0
        is_refused = self.transport.transport == "collective" and 0 < gpus < 1
        rule = f"needs gpus_per_worker of at least 1, not {gpus:g}: NCCL takes one worker a GPU"
        check(not is_refused, "transport", self.transport.transport, rule)
        number = self.workers.num_prefill_workers
        rule = "needs transport sockets: torch.distributed connects one group of attention workers"
        check(number is None or not self.is_collective, "num_prefill_workers", number, rule)
        moves = self.engine.enable_prefix_caching and self.engine.kv_fetch_limit_s > 0
        rule = "needs enable_prefix_caching and kv_fetch_limit_s: a prompt moves as cached blocks"
        check(number is None or moves, "num_prefill_workers", number, rule)
        follows = self.workers.follow_nodes or self.autoscale.autoscale != "off"
        rule = "must be left out with follow_nodes and autoscale, which know one pool of attention"
        check(number is None or not follows, "num_prefill_workers", number, rule)
        self.autoscale.check_pools(self.workers.mode, self.workers.pools)
        rule = "must be off or dry-run with follow_nodes: the nodes decide the numbers"
        is_refused = self.workers.follow_nodes and self.autoscale.autoscale == "on"
        check(not is_refused, "autoscale", self.autoscale.autoscale, rule)
        self.kv_events.check_ranks(self.workers.num_attention_ranks)
        endpoint = self.kv_events.kv_events_endpoint
        caches = self.engine.enable_prefix_caching
        rule = "needs enable_prefix_caching: without it no block is cached"
        check(endpoint is None or caches, "kv_events_endpoint", endpoint, rule)
        host = self.kv_tiers.kv_host_bytes
        check(not host or caches, "kv_host_bytes", host, rule)
        name = self.model.served_model_name
        is_refused = any(name == adapter for adapter, _ in self.lora.modules)
        check(not is_refused, "lora_modules", name, "must not name an adapter as the model")
        tied = next((str(m) for m in self.lora.adapters if m.tenants), None)
        rule = "names keys: it needs api_key or api_key_file"
        check(tied is None or self.gateway.requires_keys, "lora_modules", tied, rule)
        requests = self.gateway.max_queue * self.gateway.num_gateway_replicas
        check(
            self.workers.num_attention_ranks <= requests,
            "num_attention_workers",
            self.workers.num_attention_ranks,
            f"must not exceed the {requests} requests that are admitted at once: "
            "more workers than can ever have work",
        )

    @property
    def namespace(self) -> str:
        """Ray namespace of the controller and the workers."""
        return namespace_of(self.fleet)

    def process_name(self, name: str) -> str:
        """Return the name of a controller or worker in logs: with the model if there are others."""
        return f"{name}@{self.model.served_model_name}" if self.fleet else name

    @property
    def max_decode_rows(self) -> int:
        """Maximum number of decode rows in a step of one attention worker, with rows of drafts."""
        return self.engine.max_num_seqs + self.speculation.max_draft_rows

    @property
    def is_collective(self) -> bool:
        """Whether torch.distributed carries the rows between workers, instead of sockets.

        Needs a configuration with resolved devices and shares.
        """
        gpus = self.workers.gpus_per_worker or 0.0
        has_gpus = self.workers.device == "cuda" and gpus >= 1
        kind = self.transport.transport
        return kind == "collective" or (kind == "auto" and has_gpus)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain data that JSON can represent."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ClusterConfig:
        """Make a configuration from the data of ``to_dict``.

        Raises ``ConfigError`` for an unknown or missing name and a wrong type.
        """
        values = dict(data)
        sections = section_types()
        for name, value in data.items():
            if name in sections:
                section = _typed(name, value, dict[str, Any])
                values[name] = _from_dict(sections[name], section, f"{name}.")
            else:
                is_text = name in ("cluster_token", "fleet")
                check(is_text, name, value, "is not a section of the configuration")
        config: ClusterConfig = _from_dict(cls, values)
        return config

    def kv_fingerprint(self) -> str:
        """Return a hash of the options that determine the contents of a KV block (12 hex digits).

        Blocks on disk outlive a process and stay valid if memory limits change. The workers agree
        on the rest of the blocks' identity: see ``workers.process.kv_identity``.
        """
        engine = self.engine
        return _hash_of(
            {
                "dtype": self.model.dtype,
                "quantize": self.model.quantize,
                "quantize_layers": self.model.quantize_layers,
                "block_size_tokens": engine.block_size_tokens,
                "kv_cache_dtype": engine.kv_cache_dtype,
                "deterministic": engine.deterministic,
                "combine_mode": engine.combine_mode,
                "mode": self.workers.mode,
                "device": self.workers.device,
                "kernels": self.workers.kernels,
                "is_collective": self.is_collective,
                "has_predictor": self.speculation.has_predictor,
            }
        )

    def fingerprint(self) -> str:
        """Return a hash of all values that must be equal on every worker (12 hex digits)."""
        shared = {
            "engine": dataclasses.asdict(self.engine),
            "speculation": dataclasses.asdict(self.speculation),
            "dtype": self.model.dtype,
            "quantize": self.model.quantize,
            "quantize_layers": self.model.quantize_layers,
            "transport": self.transport.transport,
            "mode": self.workers.mode,
        }
        return _hash_of(shared)


def _hash_of(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def section_types() -> dict[str, Any]:
    """Return the class of each section of the configuration, by section name."""
    hints = get_type_hints(ClusterConfig)
    return {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}


def _from_dict(kind: Any, data: Mapping[str, Any], prefix: str = "") -> Any:
    """Construct a section, or the whole configuration, from values by name."""
    known, hints = {f.name: f for f in dataclasses.fields(kind)}, get_type_hints(kind)
    for name, value in data.items():
        check(name in known, f"{prefix}{name}", value, "is not a known setting")
    for name, one in known.items():
        is_given = name in data or {one.default, one.default_factory} != {dataclasses.MISSING}
        check(is_given, f"{prefix}{name}", None, "must be set")
    return kind(**{name: _typed(name, value, hints[name]) for name, value in data.items()})


def _typed(name: str, value: Any, kind: Any) -> Any:
    """Convert a value to type ``kind``: lists to tuples, integers to floats.

    Raises ``ConfigError`` if the value has another type.
    """
    if get_origin(kind) is Literal or dataclasses.is_dataclass(kind):
        return value  # a section checks its choices itself
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as err:
        raise ConfigError(name, value, f"has the wrong type: {err}") from err
