"""Qwen3-Next: Gated DeltaNet and gated attention, a softmax router and a gated shared expert.

The checkpoint's prediction layer (``mtp``) is not loaded.

Source: checkpoint layout and math as in transformers ``models/qwen3_next``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from workers.model.config import DeltaNetSpec, TensorPart
from workers.model.families.config_reader import (
    AttentionHeads,
    ConfigReader,
    Defaults,
    model_config,
    sparse_layers,
)
from workers.model.families.hybrid.family import HybridFamily
from workers.model.families.hybrid.settings import check_activation, read_delta_net, read_experts
from workers.model.families.parts import part

_DEFAULTS = Defaults(
    vocab_size=151936,
    hidden_size=2048,
    num_layers=48,
    max_positions=32768,
    rms_norm_eps=1e-6,
    rotary_share=0.25,
)


def family(config: Mapping[str, Any]) -> Qwen3NextFamily:
    """Return the model that ``config`` describes. Raises ``CheckpointError`` if unsupported."""
    settings = ConfigReader(config)
    settings.architecture("Qwen3NextForCausalLM")
    num_layers = settings.integer("num_hidden_layers", default=_DEFAULTS.num_layers)
    experts = read_experts(
        settings,
        sparse_layers=sparse_layers(settings, num_layers),
        num_experts=512,
        top_k=10,
        dense_width=settings.integer("intermediate_size", default=5632),
        norm_topk_prob=settings.flag("norm_topk_prob", True),
    )
    spec = read_delta_net(settings, num_layers)
    has_bias = settings.flag("attention_bias", False)
    heads = AttentionHeads.read(
        settings,
        default_hidden=_DEFAULTS.hidden_size,
        default_heads=16,
        default_kv_heads=2,
        default_head_dim=256,
    )
    shared = model_config(settings, model_type="qwen3_next", heads=heads, defaults=_DEFAULTS)
    check_activation(shared)
    return Qwen3NextFamily(replace(shared, delta_net=spec), experts, has_bias)


class Qwen3NextFamily(HybridFamily):
    def delta_parts(self, prefix: str, spec: DeltaNetSpec) -> dict[str, TensorPart]:
        values = spec.num_value_heads * spec.value_dim
        rows, width = spec.conv_width + values, self.config.hidden_size
        return {
            "qkvz": part(f"{prefix}.in_proj_qkvz.weight", rows, width),
            "ba": part(f"{prefix}.in_proj_ba.weight", 2 * spec.num_value_heads, width),
        }

    def delta_order(self, spec: DeltaNetSpec) -> Tensor:
        """Return the order of the stacked rows that ``DeltaNet`` expects. Both projections store
        rows by key head: the first one q, k, v, z, the second one strengths, decays."""
        share = spec.num_value_heads // spec.num_key_heads
        widths = [spec.key_dim, spec.key_dim, share * spec.value_dim, share * spec.value_dim]
        rows = torch.arange(spec.num_key_heads * sum(widths)).view(spec.num_key_heads, -1)
        gates = rows.numel() + torch.arange(2 * spec.num_value_heads).view(spec.num_key_heads, -1)
        parts = (*torch.split(rows, widths, 1), *torch.split(gates, share, 1))
        return torch.cat([own.flatten() for own in parts])
