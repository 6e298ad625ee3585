"""Factories of a model's parts.

``BuildingBlocks`` makes the fast parts of torch; ``batch_invariant``, ``native`` and ``cuda`` make
other implementations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from workers.model.attention import attend
from workers.model.attention_sublayer import (
    HeadAttention,
    RowAttention,
    StagedSublayer,
    TorchAttentionSublayer,
)
from workers.model.compute_threads import ComputeThreads
from workers.model.config import Activation, ModelConfig
from workers.model.delta_net import DeltaNet, Mix, TorchDeltaNet
from workers.model.latent import HeadProducts, TorchHeadProducts
from workers.model.layers import (
    Attend,
    Embedding,
    GatedMlp,
    Linear,
    Mlp,
    Norm,
    TableEmbedding,
    rms_norm,
)
from workers.model.rope import Rope, RopeConfig


class BuildingBlocks:
    """Makes the parts of a family's layers: the fast ones of torch."""

    are_native: ClassVar[bool] = False
    """Whether layers read ``AttentionBatch.chunks``."""
    are_exact: ClassVar[bool] = False
    """Whether a row's bits are independent of other rows and of how a prompt is split."""

    def __init__(self, compute_threads: ComputeThreads | None = None) -> None:
        """``compute_threads`` share large products; None: only the calling thread."""
        self._compute_threads = compute_threads or ComputeThreads()

    def linear(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        may_pack: bool = True,
        may_quantize: bool = True,
    ) -> Linear:
        """Return a linear product. ``may_quantize`` is False for routers, which must select as the
        model does."""
        return Linear(weight, bias, may_pack, self._compute_threads)

    def tied(self, weight: Tensor) -> tuple[Embedding, Linear]:
        """Return the embedding and the head that share a weight [V, H]."""
        return TableEmbedding(weight), self.linear(weight, may_pack=False)

    def mlp(
        self, gate_up: Callable[[], Tensor], down: Callable[[], Tensor], activation: Activation
    ) -> Mlp:
        """Return an MLP of weights [2 * inner, H], the gate's rows first, and [H, inner], which are
        read one after the other."""
        return GatedMlp(self.linear(gate_up()), self.linear(down()), activation)

    def head_products(self, weight: Tensor, plain_dim: int) -> HeadProducts:
        """Head products of a weight [A, N + V, R]; the first N rows of each head make keys."""
        return TorchHeadProducts(weight, plain_dim)

    def norm(self, weight: Tensor, eps: float) -> Norm:
        """Return the norm after the layers, with a weight [H]."""
        return partial(rms_norm, weight=weight, eps=eps)

    def sublayer(self, half: TorchAttentionSublayer) -> StagedSublayer:
        """Return the attention sublayer of a layer, with products of these blocks."""
        return half

    def heads(self, attention: HeadAttention, dtype: torch.dtype) -> RowAttention:
        """Return the attention of a layer that is not a whole sublayer; ``dtype`` of the model."""
        return attention

    def delta_net(self, net: DeltaNet) -> Mix:
        """Return the function of a layer with a recurrent state between its projections."""
        return TorchDeltaNet(net, row_by_row=False)

    def attention(self, config: ModelConfig, dtype: torch.dtype) -> Attend:
        """Return the attention of all layers."""
        return attend

    def rope(
        self, config: RopeConfig, max_positions: int, dtype: torch.dtype, device: torch.device
    ) -> Rope:
        return Rope(config, max_positions, dtype, device)
