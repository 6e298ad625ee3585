"""Memory of a worker's GPU: for expert slots, and for the KV that weights and steps leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from cluster.config.cluster import EngineSection
from cluster.config.gpu_memory import check_slots, kv_budget
from cluster.config.kv_cache import kv_vector_bytes
from workers.experts.transfer.peer_source import expert_num_bytes
from workers.model.config import BankSpec, ModelConfig
from workers.model.cuda_device import gpu_memory
from workers.model.families.base import Family
from workers.process.worker_args import WorkerArgs
from workers.transport.collective import CollectiveTransport
from workers.transport.transport import DataTransport

_HIDDEN_ROWS = 16
"""Rows in float32, each as wide as the residual stream, that a layer keeps for a row of a step."""
_PAIR_ROWS = 6
"""The same for each (row, expert) pair: its input, inner products, output, and their sum."""
_LOGIT_BYTES = 32
"""For each logit: float32 copies of the sampler's stages, and sorted indices."""
_ATTENTION_BYTES = 1 << 30
"""Blocks that attention gathers, and copies of them in float32."""
_NCCL_BYTES = 128 << 20
"""Buffers of NCCL for one peer: 16 channels of 4.5 MiB, and as much for the way back on some."""


def step_bytes(config: ModelConfig, banks: Sequence[BankSpec], section: EngineSection) -> int:
    """Most memory that a step takes for a time; a bound, in round numbers."""
    top_k = max((bank.top_k for bank in banks), default=0)
    rows = section.max_num_batched_tokens * (_HIDDEN_ROWS + _PAIR_ROWS * top_k)
    logits = section.max_num_seqs * config.vocab_size
    return rows * config.hidden_size * 4 + logits * _LOGIT_BYTES + _ATTENTION_BYTES


def block_bytes(section: EngineSection, config: ModelConfig, dtype: torch.dtype) -> int:
    """Of one KV block."""
    vector_bytes = kv_vector_bytes(section.kv_cache_dtype, config.head_dim, dtype.itemsize)
    return config.kv_vectors_per_token * vector_bytes * section.block_size_tokens


def section_for_gpu(
    args: WorkerArgs, family: Family, dtype: torch.dtype, transport: DataTransport
) -> EngineSection:
    """The engine's section, on a GPU with the ``kv_cache_bytes`` that its memory leaves.

    All weights are loaded, and expert slots have their memory whether filled or not. Raises
    ``ConfigError`` where no block fits.
    """
    section, workers, config = args.config.engine, args.config.workers, family.config
    if args.device.type != "cuda":
        return section
    is_nccl = isinstance(transport, CollectiveTransport)
    budget = kv_budget(
        gpu_memory(args.device, workers.gpus_per_worker or 1.0),
        {
            "steps": step_bytes(config, family.banks, section),
            "NCCL": workers.num_expert_workers * _NCCL_BYTES if is_nccl else 0,
        },
        utilization=section.gpu_memory_utilization,
        asked_bytes=section.kv_cache_bytes,
        block_bytes=block_bytes(section, config, dtype),
    )
    return replace(section, kv_cache_bytes=budget)


def check_room_for_slots(args: WorkerArgs, banks: Sequence[BankSpec], dtype: torch.dtype) -> None:
    """Raise ``ConfigError`` where a GPU is too small for the worker's expert slots."""
    if args.device.type != "cuda":
        return
    num_bytes = args.num_slots * sum(expert_num_bytes(bank, dtype) for bank in banks)
    num_workers = args.config.workers.num_expert_workers
    check_slots(num_workers, args.num_slots, num_bytes, gpu_memory(args.device).free_bytes)
