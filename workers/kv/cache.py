"""Tensors of the paged KV cache for all layers.

``workers.kv.block_pool`` tracks which blocks are in use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from cluster.config.kv_cache import KvCacheDType
from workers.model import fp8
from workers.model.attention_batch import GPU_PIECE_BYTES, PIECE_BYTES, Workspace
from workers.model.compute_threads import ComputeThreads
from workers.model.config import DeltaNetSpec, ModelConfig
from workers.model.host_copies import to_device
from workers.model.side_stream import SideStream


class KVCache:
    """Keys and values of the attention layers, and recurrent states of the other layers.

    The tensors have more blocks than the pool: the null block, which is always zero, and on a GPU
    the scratch block. They also have one state more, the zero state before any token.
    """

    def __init__(
        self,
        *,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        compute_threads: ComputeThreads,
        kv_cache_dtype: KvCacheDType = "auto",
        num_states: int = 0,
    ) -> None:
        """Allocate the tensors.

        ``dtype``: data type of the model. ``kv_cache_dtype``: see ``EngineSection``.
        ``num_states``: number of slots for recurrent states; 0 for a model without them.
        """
        self.side = SideStream(device)
        """CUDA stream of the threads that copy blocks to and from CPU memory."""
        is_fp8 = kv_cache_dtype == "fp8"
        row_size = fp8.row_bytes(config.head_dim) if is_fp8 else config.head_dim
        self.block_size = block_size
        self.null_block = num_blocks
        """Block number that pads block tables; never written."""
        num_spare = 2 if device.type == "cuda" else 1
        self.scratch_block = num_blocks + num_spare - 1
        """Block number to which padding rows, without a request, write on a GPU; the number of the
        null block on a CPU, where nothing writes to it."""
        self.layers: tuple[Tensor, ...] = tuple(
            torch.zeros(
                (config.kv_vectors_per_layer, num_blocks + num_spare, block_size, row_size),
                dtype=fp8.ROW_DTYPE if is_fp8 else dtype,
                device=device,
            )
            for _ in range(config.num_kv_caches)
        )
        """One tensor for each layer with keys and values; the predictor's tensor is last. Shape:
        [2 * num_kv_heads, all blocks, block_size, D], keys before values. Latent attention has
        one vector instead of heads. The last dimension of an fp8 cache is a row of
        ``workers.model.fp8``."""
        self.states = _states(config.delta_net, num_states, device)
        """One tensor for each layer with a recurrent state: [num_states + 1, values] float32; the
        last state is zero."""
        self.by_layer = _in_order(config, self.layers, self.states)
        """Cache tensor of each layer of the model: an element of ``layers`` or of ``states``."""
        self.predictor = self.layers[-1] if config.has_predictor else None
        """Cache tensor of the model's predictor (multi-token prediction), or None without one."""
        self._dtype = dtype
        self.has_heads = config.latent_rank is None
        """Whether blocks hold keys and values by head, as the GPU kernels need."""
        self.is_read_in_place = device.type == "cuda" and self.has_heads
        """Whether GPU kernels read blocks in place; see ``AttentionBatch.paged``."""
        self.compute_threads = compute_threads
        self.workspaces = tuple(Workspace(dtype, device) for _ in range(compute_threads.count))
        """Scratch memory of each compute thread, for gathered blocks."""

    @cached_property
    def blocks_per_piece(self) -> int:
        """Number of blocks that decode attention copies to scratch memory at a time."""
        layer = self.layers[0]
        piece = PIECE_BYTES if layer.device.type == "cpu" else GPU_PIECE_BYTES
        return piece // (layer[:, 0].numel() * self._dtype.itemsize)

    @property
    def block_shape(self) -> tuple[int, int, int, int]:
        """Shape of one block's data: [layers, vectors of a token, block_size, row]."""
        layer = self.layers[0]
        return (len(self.layers), layer.shape[0], self.block_size, layer.shape[3])

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].dtype

    @property
    def state_shape(self) -> tuple[int, int]:
        """Shape of one state's data: [layers with a state, values], float32."""
        return (len(self.states), self.states[0].shape[1]) if self.states else (0, 0)

    @property
    def block_bytes(self) -> int:
        return math.prod(self.block_shape) * self.dtype.itemsize

    @property
    def state_bytes(self) -> int:
        return math.prod(self.state_shape) * torch.float32.itemsize

    def read_state(self, slot: int) -> Tensor:
        """Copy a state to CPU memory. Any thread may call it while the slot has a holder."""
        with self.side.work():
            return self.side.to_host(torch.stack([layer[slot] for layer in self.states]))

    def write_state(self, slot: int, data: Tensor) -> None:
        """Fill a slot. Any thread that holds the slot may call it before the state is stored."""
        with self.side.work():
            for layer, part in zip(self.states, self.side.to_device(data), strict=True):
                layer[slot] = part

    def read_block(self, block: int) -> Tensor:
        """Copy a block to CPU memory. Any thread may call it while the block has a holder."""
        with self.side.work():
            return self.side.to_host(torch.stack([layer[:, block] for layer in self.layers]))

    def write_block(self, block: int, data: Tensor) -> None:
        """Fill a block. Any thread that holds the block may call it before its hash is stored."""
        with self.side.work():
            for layer, part in zip(self.layers, self.side.to_device(data), strict=True):
                layer[:, block] = part

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, given as (source, target) pairs. Call it between two steps."""
        if pairs:
            device = self.layers[0].device
            sources, targets = (to_device(part, device) for part in zip(*pairs, strict=True))
            for layer in self.layers:
                layer[:, targets] = layer[:, sources]

    def clear_slots(self, slots: Sequence[int]) -> None:
        """Zero single cache slots (block * block_size + offset); see ``clear``."""
        if slots:
            places = to_device(slots, self.layers[0].device)
            for layer in self.layers:
                layer.view(layer.shape[0], -1, layer.shape[3])[:, places] = 0

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero blocks that may hold NaN: attention computes 0 * value for masked positions."""
        if blocks:
            places = to_device(blocks, self.layers[0].device)
            for layer in self.layers:
                layer[:, places] = 0


def _states(spec: DeltaNetSpec | None, num_states: int, device: torch.device) -> tuple[Tensor, ...]:
    if spec is None:
        return ()
    shape = (num_states + 1, spec.layer_values)
    return tuple(torch.zeros(shape, dtype=torch.float32, device=device) for _ in spec.layers)


def _in_order(
    config: ModelConfig, layers: Sequence[Tensor], states: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return the tensor of each layer of the model, in the order of the layers."""
    if config.delta_net is None:
        return tuple(layers[: config.num_layers])
    found = dict(zip(config.kv_layers, layers, strict=True))
    found |= zip(config.delta_net.layers, states, strict=True)
    return tuple(found[layer] for layer in range(config.num_layers))
