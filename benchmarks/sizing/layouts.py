"""Layouts of GPUs for a model, with their memory and predicted speed. Pure.

A layout is whole nodes of 8 GPUs, split into attention and expert workers of one GPU each. On one
node every split with two workers of each is compared; on several a pool is whole nodes, from three
nodes on at least two of them for experts. Of those that fit into memory the one with the most
tokens a second is taken, by the roofline of ``cluster.sizing.roofline``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cluster.config.cluster import EngineSection
from cluster.core.errors import ConfigError
from cluster.sizing.devices import GPU_NETWORK_BYTES_S
from cluster.sizing.gpus import A100, H100, H200
from cluster.sizing.roofline import DeviceSpec, ModelSize, disaggregated_step

GPUS_PER_NODE = 8
MEMORY_SHARE = 0.9
"""Fraction of a GPU's memory for weights and KV; the rest is for activations and libraries."""
BALANCEDNESS = 0.9
"""Mean load divided by the load of the busiest expert worker, as rebalancing keeps it."""
SPARE_SHARE = 0.25
"""Spare slots on one node as a fraction of a worker's other slots, for rebalancing."""
CONTEXT_TOKENS = 2048
"""Mean context of a sequence."""
MAX_SEQS = 64
"""Sequences for each GPU of the cluster, as far as their KV fits."""
_STATES, _CACHED_STATES = 3, EngineSection().num_cached_states
"""Recurrent states of models that have such, for each sequence and for each GPU: see
``EngineSection.num_states``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeKind:
    """A server of 8 GPUs."""

    name: str
    """Name in the tables."""
    gpu: DeviceSpec
    """Capacity of each GPU, with its link to the others."""
    memory_bytes: float
    """Memory of each GPU in bytes."""
    network_bytes_s: float
    """Bandwidth of each GPU to other nodes in one direction, bytes a second."""

    def worker(self, num_nodes: int) -> DeviceSpec:
        """Capacity of a worker with one of the GPUs, if the workers are on this number of nodes."""
        return self.gpu if num_nodes == 1 else replace(self.gpu, link_bytes_s=self.network_bytes_s)


A100_NODE = NodeKind(
    name="A100-80GB",
    gpu=A100,
    memory_bytes=80e9,
    network_bytes_s=25e9,
)
"""Nodes with one 200 Gbit/s adapter for each GPU."""
H100_NODE = NodeKind(
    name="H100-80GB",
    gpu=H100,
    memory_bytes=80e9,
    network_bytes_s=GPU_NETWORK_BYTES_S,
)
H200_NODE = NodeKind(
    name="H200-141GB",
    gpu=H200,
    memory_bytes=141e9,
    network_bytes_s=GPU_NETWORK_BYTES_S,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SizedModel:
    """A model and the weights of its attention workers."""

    size: ModelSize
    """Shape of the model for the roofline."""
    attention_weights: int
    """Number of weights of an attention worker, including embeddings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The workers for a model on some nodes."""

    num_nodes: int
    """Number of nodes of 8 GPUs."""
    num_attention: int
    """Number of attention workers with one GPU each."""
    num_experts: int
    """Number of expert workers with one GPU each."""
    num_redundant: int
    """``--num-redundant-experts``: spare slots of an expert worker and bank."""
    attention_bytes: float
    """Bytes of weights on the GPU of an attention worker."""
    expert_bytes: float
    """Bytes of weights on the GPU of an expert worker with all spare slots in use."""
    kv_tokens: int
    """Tokens in the KV cache of an attention worker."""
    num_seqs: int
    """Sequences in a decode step, over all attention workers."""
    step_s: float
    """Predicted seconds of a decode step with ``num_seqs`` sequences."""

    @property
    def tokens_per_s(self) -> float:
        """Decoded tokens a second, over all sequences."""
        return self.num_seqs / self.step_s

    @property
    def gpu_hours_per_million(self) -> float:
        """GPU-hours for a million decoded tokens."""
        return self.num_nodes * GPUS_PER_NODE / self.tokens_per_s / 3600 * 1e6


def best_layout(
    model: SizedModel, node: NodeKind, num_nodes: int, max_seqs: int = MAX_SEQS
) -> Layout:
    """Return the fastest layout that fits, with up to ``max_seqs`` sequences for each GPU.

    Raises ``ConfigError`` if no layout fits.
    """
    found = list(_layouts(model, node, num_nodes, max_seqs))
    if not found:
        raise ConfigError("num_nodes", num_nodes, f"of {node.name} are too few for the model")
    return max(found, key=lambda layout: layout.tokens_per_s)


def _layouts(model: SizedModel, node: NodeKind, num_nodes: int, max_seqs: int) -> Iterator[Layout]:
    first, step = (2, 1) if num_nodes == 1 else (GPUS_PER_NODE, GPUS_PER_NODE)
    total = num_nodes * GPUS_PER_NODE
    num_logical = min(bank.num_experts for bank in model.size.banks)
    fewest = step if num_nodes == 2 else 2 * step
    for num_attention in range(first, total - fewest + 1, step):
        if total - num_attention <= num_logical:
            layout = _layout(model, node, num_nodes, num_attention, max_seqs)
            if layout.num_seqs > 0 and layout.expert_bytes <= MEMORY_SHARE * node.memory_bytes:
                yield layout


def _layout(
    model: SizedModel, node: NodeKind, num_nodes: int, num_attention: int, max_seqs: int
) -> Layout:
    size = model.size
    num_experts = num_nodes * GPUS_PER_NODE - num_attention
    own = math.ceil(min(bank.num_experts for bank in size.banks) / num_experts)
    # A whole copy on either of two hosts or more; on one host only room to rebalance.
    several = num_experts > GPUS_PER_NODE
    spare = own if several else math.ceil(SPARE_SHARE * own)
    slot_bytes = sum(bank.memory_bytes(size.itemsize) for bank in size.banks)
    room = MEMORY_SHARE * node.memory_bytes
    spare = max(0, min(spare, int(room // slot_bytes) - own))
    attention_bytes = float(model.attention_weights * size.itemsize)
    kv_tokens = int(max(room - attention_bytes, 0.0) // size.kv_bytes_per_token)
    # Of KV that has the size of a sequence's recurrent states.
    state_tokens = math.ceil(_STATES * size.state_bytes / size.kv_bytes_per_token)
    kv_tokens -= math.ceil(_CACHED_STATES * size.state_bytes / size.kv_bytes_per_token)
    num_seqs = min(
        max_seqs * num_nodes * GPUS_PER_NODE,
        num_attention * kv_tokens // (CONTEXT_TOKENS + state_tokens),
    )
    kv_tokens -= math.ceil(num_seqs / num_attention) * state_tokens
    decode = disaggregated_step(
        size,
        max(num_seqs, 1),
        CONTEXT_TOKENS,
        num_attention=num_attention,
        num_experts=num_experts,
        device=node.worker(num_nodes),
        balancedness=BALANCEDNESS,
    )
    return Layout(
        num_nodes=num_nodes,
        num_attention=num_attention,
        num_experts=num_experts,
        num_redundant=spare,
        attention_bytes=attention_bytes,
        expert_bytes=float((own + spare) * slot_bytes),
        kv_tokens=kv_tokens,
        num_seqs=num_seqs,
        step_s=decode.step_s,
    )
