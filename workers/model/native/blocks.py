"""Building blocks that compute with native kernels (``workers.native``).

A row's bits depend neither on other rows nor on the number of threads, so these blocks are used
with and without ``--deterministic``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from workers.model.attention_sublayer import (
    HeadAttention,
    RowAttention,
    StagedSublayer,
    TorchAttentionSublayer,
)
from workers.model.building_blocks import BuildingBlocks
from workers.model.config import Activation
from workers.model.delta_net import DeltaNet, Mix
from workers.model.latent import HeadProducts
from workers.model.layers import Embedding, Linear, Mlp, Norm, TableEmbedding
from workers.model.native.delta_net import NativeDeltaNet
from workers.model.native.native_sublayer import NativeAttention, NativeAttentionSublayer
from workers.model.native.products import NativeHeadProducts, NativeLinear, NativeMlp, NativeNorm
from workers.model.rope import Rope, RopeConfig
from workers.native.thread_team import ThreadTeam
from workers.quantization.formats import WeightFormat


class NativeBlocks(BuildingBlocks):
    """Building blocks that compute with native kernels on a team of CPU threads."""

    are_native: ClassVar[bool] = True
    are_exact: ClassVar[bool] = True

    def __init__(self, team: ThreadTeam, form: WeightFormat | None = None) -> None:
        """``team``: threads that compute. ``form``: format to which weights are quantized, except
        those of routers and of latent attention's heads; None: not quantized."""
        super().__init__()
        self._team = team
        self._form = form

    def linear(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        may_pack: bool = True,
        may_quantize: bool = True,
    ) -> Linear:
        """Return a native product, which copies the weight; ``may_pack`` has no effect."""
        return NativeLinear(self._team, weight, bias, self._form if may_quantize else None)

    def tied(self, weight: Tensor) -> tuple[Embedding, Linear]:
        """Return an embedding and an lm_head with a weight [vocabulary, H]. They share the packed
        weight, unless lm_head is quantized: the embedding then has a copy."""
        linear = NativeLinear(self._team, weight, None, self._form)
        if linear.matrix.form is not None:
            return TableEmbedding(weight.clone()), linear
        return linear.matrix.rows, linear

    def mlp(
        self, gate_up: Callable[[], Tensor], down: Callable[[], Tensor], activation: Activation
    ) -> Mlp:
        if activation != "silu":
            return super().mlp(gate_up, down, activation)
        return NativeMlp(self._team, gate_up, down, self._form)

    def head_products(self, weight: Tensor, plain_dim: int) -> HeadProducts:
        return NativeHeadProducts(self._team, weight, plain_dim)

    def norm(self, weight: Tensor, eps: float) -> Norm:
        return NativeNorm(self._team, weight, eps)

    def sublayer(self, half: TorchAttentionSublayer) -> StagedSublayer:
        return NativeAttentionSublayer(self._team, half)

    def heads(self, attention: HeadAttention, dtype: torch.dtype) -> RowAttention:
        return NativeAttention(self._team, attention, dtype)

    def delta_net(self, net: DeltaNet) -> Mix:
        return NativeDeltaNet(self._team, net)

    def rope(
        self, config: RopeConfig, max_positions: int, dtype: torch.dtype, device: torch.device
    ) -> Rope:
        """Return a rotary embedding in which a row's bits do not depend on other rows."""
        return Rope(config, max_positions, dtype, device, row_by_row=True)
