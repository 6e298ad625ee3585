"""Factory of a model's parts: products, norms, attention, rotation.

``BuildingBlocks`` makes parts that compute with torch. Its subclasses in ``batch_invariant``,
``native`` and ``cuda`` make parts with other implementations.
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
    """Factory of the parts of a model's layers. This base class makes parts that use torch, without
    batch invariance."""

    are_native: ClassVar[bool] = False
    """Whether layers read ``AttentionBatch.chunks``, the input of native kernels."""
    are_exact: ClassVar[bool] = False
    """Whether a row's bits are independent of other rows and of how a prompt is split."""

    def __init__(self, compute_threads: ComputeThreads | None = None) -> None:
        """``compute_threads``: threads that share large products; None: the calling thread."""
        self._compute_threads = compute_threads or ComputeThreads()

    def linear(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        may_pack: bool = True,
        may_quantize: bool = True,
    ) -> Linear:
        """Return a linear product with ``weight`` [out, in]; ``may_pack``: see ``Linear``.
        ``may_quantize`` is False for routers, as rounding would change which experts they
        select."""
        return Linear(weight, bias, may_pack, self._compute_threads)

    def tied(self, weight: Tensor) -> tuple[Embedding, Linear]:
        """Return an embedding and an lm_head that share a weight [vocabulary, H]."""
        return TableEmbedding(weight), self.linear(weight, may_pack=False)

    def mlp(
        self, gate_up: Callable[[], Tensor], down: Callable[[], Tensor], activation: Activation
    ) -> Mlp:
        """Return a gated MLP. ``gate_up`` reads a weight [2 * inner, H] with the gate's rows first,
        ``down`` reads [H, inner]. They are called one after the other, to save memory."""
        return GatedMlp(self.linear(gate_up()), self.linear(down()), activation)

    def head_products(self, weight: Tensor, plain_dim: int) -> HeadProducts:
        """Return each head's products for latent attention, with a weight [A, N + V, R]: the first
        N (``plain_dim``) rows of a head make its keys, the other V rows its values."""
        return TorchHeadProducts(weight, plain_dim)

    def norm(self, weight: Tensor, eps: float) -> Norm:
        """Return an RMS norm with a weight [H]. The norm may change its input in place."""
        return partial(rms_norm, weight=weight, eps=eps)

    def sublayer(self, half: TorchAttentionSublayer) -> StagedSublayer:
        """Return the attention sublayer that ``half`` describes, with this factory's kernels."""
        return half

    def heads(self, attention: HeadAttention, dtype: torch.dtype) -> RowAttention:
        """Return attention from projected rows to attended values, for layers that compute the rest
        of the attention sublayer themselves."""
        return attention

    def delta_net(self, net: DeltaNet) -> Mix:
        """Return the function that computes a Gated DeltaNet layer between its input and output
        projections."""
        return TorchDeltaNet(net, row_by_row=False)

    def attention(self, config: ModelConfig, dtype: torch.dtype) -> Attend:
        """Return the function that computes attention in all layers of the model."""
        return attend

    def rope(
        self, config: RopeConfig, max_positions: int, dtype: torch.dtype, device: torch.device
    ) -> Rope:
        return Rope(config, max_positions, dtype, device)
