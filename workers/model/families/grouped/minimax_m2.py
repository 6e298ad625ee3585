"""MiniMax-M2: norms over all heads together, a part of each head rotated, a sigmoid router.

The checkpoint's prediction layers, which follow the last layer, are not loaded.

Source: checkpoint layout and math as in transformers ``models/minimax_m2``. There the router's
product is in the model's dtype; here it is float32, as in the other sigmoid routers.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch

from cluster.core.errors import CheckpointError
from workers.model.config import BankSpec, ExpertMatrix, ModelConfig, TensorPart
from workers.model.families.base import Family, Loader
from workers.model.families.config_reader import (
    AttentionHeads,
    ConfigReader,
    Defaults,
    model_config,
)
from workers.model.families.decoder import DecoderLayer, dense_attention_layer
from workers.model.families.parts import (
    block_sparse_expert,
    norm_parts,
    part,
    projection_parts,
)
from workers.model.families.routed_experts import RoutedExperts
from workers.model.routing import Router

_DEFAULTS = Defaults(
    vocab_size=200064,
    hidden_size=3072,
    num_layers=62,
    max_positions=196608,
    rms_norm_eps=1e-6,
    rope_theta=5e6,
    rotary_share=1.0,
    eos=(200020,),
)
_HEAD_DIM = 128


def family(config: Mapping[str, Any]) -> MiniMaxM2Family:
    """Return the model that ``config`` describes. Raises ``CheckpointError`` if unsupported."""
    settings = ConfigReader(config)
    settings.architecture("MiniMaxM2ForCausalLM")
    experts = RoutedExperts.read(
        settings,
        num_experts=(256, "num_local_experts", "num_experts"),
        top_k=(8, "num_experts_per_tok"),
        expert_width=(1536, "intermediate_size"),
    )
    kinds = settings.value("attn_type_list", default=[])
    if not isinstance(kinds, list) or any(kind != 1 for kind in kinds):
        raise CheckpointError(
            f"config.json: attn_type_list {kinds!r} of minimax_m2 must be 1 in every layer"
        )
    heads = AttentionHeads.read(
        settings,
        default_hidden=_DEFAULTS.hidden_size,
        default_heads=48,
        default_kv_heads=8,
        default_head_dim=_HEAD_DIM,
    )
    shared = model_config(settings, model_type="minimax_m2", heads=heads, defaults=_DEFAULTS)
    return MiniMaxM2Family(shared, experts)


class MiniMaxM2Family(Family):
    def __init__(self, config: ModelConfig, experts: RoutedExperts) -> None:
        super().__init__(config, experts.banks(config, float32_weights=True))
        self.experts = experts

    def expert_matrices(
        self, bank: BankSpec, exchange: int, expert: int, names: Container[str]
    ) -> tuple[ExpertMatrix, ...]:
        """Return the tensor parts that make up one expert's matrices; see ``Family``."""
        return block_sparse_expert(bank, expert)

    def layer_parts(self, layer: int) -> dict[str, TensorPart]:
        config, prefix = self.config, f"model.layers.{layer}"
        width, experts = config.hidden_size, self.experts.num_experts
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        return {
            **norm_parts(prefix, config),
            "q_norm": part(f"{prefix}.self_attn.q_norm.weight", q),
            "k_norm": part(f"{prefix}.self_attn.k_norm.weight", kv),
            "router": part(f"{prefix}.block_sparse_moe.gate.weight", experts, width),
            "correction": part(f"{prefix}.block_sparse_moe.e_score_correction_bias", experts),
        } | projection_parts(f"{prefix}.self_attn", config, has_bias=False)

    def make_layer(self, layer: int, loader: Loader) -> DecoderLayer:
        router = Router(
            routing=self.experts.routing(layer, "sigmoid", is_normed=True),
            linear=loader.float32_linear("router"),
            correction=loader.tensor("correction", dtype=torch.float32),
        )
        return dense_attention_layer(
            self.config,
            loader,
            router=router,
            qk_norm=loader.tensor("q_norm", "k_norm"),
        )
