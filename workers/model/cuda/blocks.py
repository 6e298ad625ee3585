"""Factory of the parts of a model on a GPU."""

from __future__ import annotations

import torch

from workers.model.attention import attend
from workers.model.attention_sublayer import (
    HeadAttention,
    RowAttention,
    StagedSublayer,
    TorchAttentionSublayer,
)
from workers.model.building_blocks import BuildingBlocks
from workers.model.config import ModelConfig
from workers.model.cuda.attention import attend_in_place
from workers.model.cuda.cuda_sublayer import CudaAttention, CudaAttentionSublayer
from workers.model.layers import Attend


class CudaBlocks(BuildingBlocks):
    """Building blocks for a GPU: attention sublayers use GPU kernels; latent attention and all
    other parts use torch."""

    def sublayer(self, half: TorchAttentionSublayer) -> StagedSublayer:
        return CudaAttentionSublayer(half)

    def heads(self, attention: HeadAttention, dtype: torch.dtype) -> RowAttention:
        return CudaAttention(attention)

    def attention(self, config: ModelConfig, dtype: torch.dtype) -> Attend:
        return attend_in_place if config.latent_rank is None else attend
