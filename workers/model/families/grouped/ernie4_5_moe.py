"""ERNIE 4.5: interleaved RoPE, a softmax router with correction, shared experts, dense layers.

Source: checkpoint layout and math as in transformers ``models/ernie4_5_moe``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cluster.core.errors import CheckpointError
from workers.model.config import ModelConfig, TensorPart
from workers.model.families.base import Family, Loader
from workers.model.families.config_reader import (
    AttentionHeads,
    ConfigReader,
    Defaults,
    model_config,
)
from workers.model.families.decoder import DecoderLayer, dense_attention_layer
from workers.model.families.parts import (
    mlp_parts,
    norm_parts,
    part,
    projection_parts,
)
from workers.model.families.routed_experts import RoutedExperts
from workers.model.routing import Router

_DEFAULTS = Defaults(
    vocab_size=103424,
    hidden_size=2560,
    num_layers=28,
    max_positions=131072,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
    rotates_neighbours=True,
    tied=True,
    eos=(2,),
    pad=0,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ernie45MoeConfig:
    """Settings of ERNIE 4.5 beyond ``ModelConfig``."""

    experts: RoutedExperts
    num_shared_experts: int
    """Number of shared experts, computed as one MLP of this number times an expert's width."""
    dense_width: int
    """Inner width of the MLP of a dense layer."""
    least_sum: float
    """Lower bound of the sum by which router weights are divided (``moe_norm_min``)."""


def family(config: Mapping[str, Any]) -> Ernie45MoeFamily:
    """Return the model that ``config`` describes. Raises ``CheckpointError`` if unsupported."""
    settings = ConfigReader(config)
    settings.architecture("Ernie4_5_MoeForCausalLM")
    own = Ernie45MoeConfig(
        experts=RoutedExperts.read(
            settings,
            num_experts=(64, "moe_num_experts", "num_experts"),
            top_k=(6, "moe_k", "num_experts_per_tok"),
            expert_width=(1536, "moe_intermediate_size"),
            sparse_layers=_sparse_layers(settings),
        ),
        num_shared_experts=settings.integer("moe_num_shared_experts", default=2, least=0),
        dense_width=settings.integer("intermediate_size", default=12288),
        least_sum=settings.real("moe_norm_min", 1e-12),
    )
    heads = AttentionHeads.read(
        settings, default_hidden=_DEFAULTS.hidden_size, default_heads=20, default_kv_heads=4
    )
    shared = model_config(settings, model_type="ernie4_5_moe", heads=heads, defaults=_DEFAULTS)
    return Ernie45MoeFamily(shared, own)


def _sparse_layers(settings: ConfigReader) -> tuple[int, ...]:
    """Return layers with experts: each ``moe_layer_interval``-th from start to end, inclusive."""
    num_layers = settings.integer("num_hidden_layers", default=_DEFAULTS.num_layers)
    interval = settings.integer("moe_layer_interval", default=1)
    first = settings.integer("moe_layer_start_index", default=1, least=0)
    last = settings.integer("moe_layer_end_index", default=-1, least=-1)
    last = num_layers - 1 if last == -1 else last
    found = tuple(i for i in range(num_layers) if first <= i <= last and (i + 1) % interval == 0)
    if not found:
        raise CheckpointError(
            f"config.json: moe_layer_start_index {first}, moe_layer_end_index {last} and "
            f"moe_layer_interval {interval} leave no layer with experts of num_hidden_layers "
            f"{num_layers}"
        )
    return found


class Ernie45MoeFamily(Family):
    def __init__(self, config: ModelConfig, ernie: Ernie45MoeConfig) -> None:
        super().__init__(config, ernie.experts.banks(config))
        self.ernie = ernie

    def layer_parts(self, layer: int) -> dict[str, TensorPart]:
        """Return a layer's tensors; ``gate``, ``up``, ``down``: dense MLP or shared experts."""
        config, own, prefix = self.config, self.ernie, f"model.layers.{layer}"
        width = config.hidden_size
        parts = {
            **norm_parts(prefix, config),
            **projection_parts(f"{prefix}.self_attn", config, has_bias=False),
        }
        if not own.experts.is_in(layer):
            return parts | mlp_parts(f"{prefix}.mlp", width, own.dense_width)
        parts |= {
            "router": part(f"{prefix}.mlp.gate.weight", own.experts.num_experts, width),
            "correction": part(
                f"{prefix}.mlp.moe_statics.e_score_correction_bias", 1, own.experts.num_experts
            ),
        }
        if not own.num_shared_experts:
            return parts
        shared = own.experts.expert_width * own.num_shared_experts
        return parts | mlp_parts(f"{prefix}.mlp.shared_experts", width, shared)

    def make_layer(self, layer: int, loader: Loader) -> DecoderLayer:
        return dense_attention_layer(self.config, loader, router=self._router(layer, loader))

    def _router(self, layer: int, loader: Loader) -> Router | None:
        own = self.ernie
        if not own.experts.is_in(layer):
            return None
        routing = own.experts.routing(
            layer, "softmax", is_normed=True, float32_product=True, least_sum=own.least_sum
        )
        return Router(
            routing=routing,
            linear=loader.float32_linear("router", rounds=False),
            correction=loader.tensor("correction", dtype=torch.float32).flatten(),
        )
