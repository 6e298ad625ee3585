"""Divides a worker's GPU memory: weights, expert slots, steps, and the KV cache in the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from cluster.config.cluster import EngineSection
from cluster.config.gpu_memory import check_slots, kv_budget
from cluster.config.kv_cache import kv_vector_bytes
from cluster.core.checks import check
from workers.cuda.step_graph import MAX_KEPT
from workers.model.config import BankSpec, ModelConfig, returns_pairs
from workers.model.cuda.device import gpu_memory
from workers.model.families.base import Family
from workers.process.worker_args import WorkerArgs
from workers.requests.buckets import buckets_up_to, kept_rows
from workers.requests.step_header import MAX_MICRO_BATCHES
from workers.transport.collective import CollectiveTransport
from workers.transport.transport import DataTransport

_HIDDEN_ROWS = 16
"""Number of float32 rows of the model's width that a layer needs for each row of a step."""
_PAIR_ROWS = 6
"""As ``_HIDDEN_ROWS``, for each (row, expert) pair: input, inner products, output, sum."""
_LOGIT_BYTES = 32
"""Bytes per logit: float32 copies of the sampler's stages, and its largest logits."""
_ATTENTION_BYTES = 1 << 30
"""Bytes of blocks that attention gathers, and of their float32 copies."""
_GRAPH_BYTES = 16 << 20
"""Bytes of one captured step without its tensors: several hundred nodes with arguments."""
_NCCL_BYTES = 128 << 20
"""Bytes of NCCL buffers for one peer: 16 channels of 4.5 MiB, some with two buffers."""


def step_bytes(
    config: ModelConfig,
    banks: Sequence[BankSpec],
    section: EngineSection,
    max_draft_rows: int = 0,
) -> int:
    """Upper bound of the temporary memory of a step, in bytes."""
    top_k = max((bank.top_k for bank in banks), default=0)
    rows = section.step_tokens * (_HIDDEN_ROWS + _PAIR_ROWS * top_k)
    logits = (section.max_num_seqs + max_draft_rows) * config.vocab_size
    return rows * config.hidden_size * 4 + logits * _LOGIT_BYTES + _ATTENTION_BYTES


def expert_step_bytes(config: ModelConfig, banks: Sequence[BankSpec], num_rows: int) -> int:
    """Upper bound of an expert worker's memory for a step with ``num_rows`` rows, in bytes."""
    top_k = max((bank.top_k for bank in banks), default=0)
    return num_rows * (2 + _PAIR_ROWS * top_k) * config.hidden_size * 4


def captured_sizes(args: WorkerArgs, family: Family) -> tuple[int, ...]:
    """Batch sizes of the steps captured as CUDA graphs; empty if steps cannot be captured."""
    section, config = args.config.engine, family.config
    is_local = args.config.workers.mode == "local"
    is_read = not is_local and returns_pairs(family.banks, section.combine_mode)
    has_heads = config.latent_rank is None
    is_capturable = has_heads and config.delta_net is None and not config.has_predictor
    if args.device.type != "cuda" or section.enforce_eager or is_read or not is_capturable:
        return ()
    return buckets_up_to(args.config.max_decode_rows)


def graph_bytes(
    config: ModelConfig, banks: Sequence[BankSpec], buckets: Sequence[int], num_peers: int
) -> int:
    """Bytes of all captured steps, 0 without ``buckets``; each has exchange buffers per peer."""
    if not buckets:
        return 0
    each = kept_rows(buckets) * config.hidden_size * 4 * 2
    return MAX_KEPT * _GRAPH_BYTES + each * len(banks) * num_peers


def logits_bytes(config: ModelConfig, buckets: Sequence[int]) -> int:
    """Bytes of the logits that all captured steps of an attention worker write."""
    return MAX_MICRO_BATCHES * max(buckets, default=0) * config.vocab_size * 4


def block_bytes(section: EngineSection, config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one KV block."""
    vector_bytes = kv_vector_bytes(section.kv_cache_dtype, config.head_dim, dtype.itemsize)
    return config.kv_vectors_per_token * vector_bytes * section.block_size_tokens


def section_for_gpu(
    args: WorkerArgs, family: Family, dtype: torch.dtype, transport: DataTransport
) -> EngineSection:
    """The engine's section. On a GPU, ``kv_cache_bytes`` is the free memory minus the reserves.

    Call it when all weights are loaded and the expert slots are allocated. Raises ``ConfigError``
    if no KV block fits.
    """
    section, workers, config = args.config.engine, args.config.workers, family.config
    if args.device.type != "cuda":
        return section
    is_nccl = isinstance(transport, CollectiveTransport)
    num_peers = 0 if workers.mode == "local" else workers.num_expert_workers
    steps = step_bytes(config, family.banks, section, args.config.speculation.max_draft_rows)
    steps += logits_bytes(config, captured_sizes(args, family))
    budget = kv_budget(
        gpu_memory(args.device, workers.gpus_per_worker or 1.0),
        _reserved_bytes(args, family, steps, num_peers, is_nccl),
        utilization=section.gpu_memory_utilization,
        asked_bytes=section.kv_cache_bytes,
        block_bytes=block_bytes(section, config, dtype),
        state_bytes=_state_bytes(section, config),
    )
    return replace(section, kv_cache_bytes=budget)


def check_memory_for_states(args: WorkerArgs, family: Family) -> None:
    """Raise ``ConfigError`` if a GPU is too small for the recurrent states of all sequences."""
    if args.device.type != "cuda":
        return
    section, workers = args.config.engine, args.config.workers
    num_bytes = _state_bytes(section, family.config)
    free = gpu_memory(args.device, workers.gpus_per_worker or 1.0).free_bytes
    rule = f"must be less: recurrent states take {num_bytes} bytes, and {free} are free on the GPU"
    check(num_bytes <= free, "max_num_seqs", section.max_num_seqs, rule)


def _state_bytes(section: EngineSection, config: ModelConfig) -> int:
    """Bytes of all state slots, and of the zero state before any token."""
    return (section.num_states + 1) * config.state_bytes


def _reserved_bytes(
    args: WorkerArgs, family: Family, steps: int, num_peers: int, is_nccl: bool
) -> dict[str, int]:
    """Bytes that serving will allocate, by purpose. ``steps``: bytes of the largest step."""
    buckets = captured_sizes(args, family)
    return {
        "steps": steps,
        "CUDA graphs": graph_bytes(family.config, family.banks, buckets, num_peers),
        "NCCL": num_peers * _NCCL_BYTES if is_nccl else 0,
    }


def check_memory_for_slots(args: WorkerArgs, family: Family, dtype: torch.dtype) -> None:
    """Raise ``ConfigError`` if a GPU is too small for the worker's expert slots."""
    if args.device.type != "cuda":
        return
    section, workers, config = args.config.engine, args.config.workers, family.config
    num_bytes = args.num_slots * sum(bank.num_bytes(dtype.itemsize) for bank in family.banks)
    num_peers = workers.num_attention_ranks
    rows = num_peers * section.step_tokens
    steps = expert_step_bytes(config, family.banks, rows)
    reserves = _reserved_bytes(args, family, steps, num_peers, args.config.is_collective)
    free_bytes = gpu_memory(args.device).free_bytes
    check_slots(workers.num_expert_workers, args.num_slots, num_bytes, free_bytes, reserves)
