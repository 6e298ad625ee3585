"""Building blocks that compute with native kernels (``workers.native``).

A row's bits depend neither on other rows nor on the number of threads, so these blocks serve with
``--deterministic`` and without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from workers.model.building_blocks import BuildingBlocks
from workers.model.config import Activation
from workers.model.delta_net import DeltaNet, Mix
from workers.model.half import (
    AttendsRows,
    AttentionHalf,
    HeadAttention,
    StagedHalf,
)
from workers.model.latent import HeadProducts
from workers.model.layers import Embedding, Linear, Mlp, Norm
from workers.model.native.delta_net import NativeDeltaNet
from workers.model.native.half import NativeAttention, NativeHalf
from workers.model.native.products import NativeHeadProducts, NativeLinear, NativeMlp, NativeNorm
from workers.model.rope import Rope, RopeConfig
from workers.native.team import Team


class NativeBlocks(BuildingBlocks):
    """Building blocks over a team of threads, for models on a CPU."""

    are_native: ClassVar[bool] = True
    are_exact: ClassVar[bool] = True

    def __init__(self, team: Team) -> None:
        super().__init__()
        self._team = team

    def linear(self, weight: Tensor, bias: Tensor | None = None, may_pack: bool = True) -> Linear:
        """A native product. A weight that is used elsewhere is copied."""
        return NativeLinear(self._team, weight, bias)

    def tied(self, weight: Tensor) -> tuple[Embedding, Linear]:
        """Both read the packed weight."""
        linear = NativeLinear(self._team, weight, None)
        return linear.matrix.rows, linear

    def mlp(
        self, gate_up: Callable[[], Tensor], down: Callable[[], Tensor], activation: Activation
    ) -> Mlp:
        if activation != "silu":
            return super().mlp(gate_up, down, activation)
        return NativeMlp(self._team, gate_up, down)

    def head_products(self, weight: Tensor, plain_dim: int) -> HeadProducts:
        return NativeHeadProducts(self._team, weight, plain_dim)

    def norm(self, weight: Tensor, eps: float) -> Norm:
        return NativeNorm(self._team, weight, eps)

    def half(self, half: AttentionHalf) -> StagedHalf:
        return NativeHalf(self._team, half)

    def heads(self, attention: HeadAttention, dtype: torch.dtype) -> AttendsRows:
        return NativeAttention(self._team, attention, dtype)

    def delta_net(self, net: DeltaNet) -> Mix:
        return NativeDeltaNet(self._team, net)

    def rope(
        self, config: RopeConfig, max_positions: int, dtype: torch.dtype, device: torch.device
    ) -> Rope:
        """Rotations; those that are computed in the step, row by row."""
        return Rope(config, max_positions, dtype, device, row_by_row=True)
