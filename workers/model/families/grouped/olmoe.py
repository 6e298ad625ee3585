"""OLMoE: every layer has attention with whole-vector q/k norms, and a bank of routed experts.

Source: checkpoint layout and math as in transformers ``models/olmoe``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
    norm_parts,
    part,
    projection_parts,
)
from workers.model.families.routed_experts import RoutedExperts
from workers.model.routing import Router

_DEFAULTS = Defaults(
    vocab_size=50304,
    hidden_size=2048,
    num_layers=16,
    max_positions=4096,
    rms_norm_eps=1e-5,
    eos=(50279,),
    pad=1,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class OlmoeConfig:
    """Settings of OLMoE beyond ``ModelConfig``."""

    experts: RoutedExperts
    norm_topk_prob: bool
    """Whether the weights of the selected experts are scaled to sum 1."""
    attention_bias: bool
    """Whether q, k, v and o have biases."""
    clip_qkv: float | None
    """Limit of the absolute values of q, k and v, after the norms; None: no limit."""


def family(config: Mapping[str, Any]) -> OlmoeFamily:
    """Return the model that ``config`` describes. Raises ``CheckpointError`` if unsupported."""
    settings = ConfigReader(config)
    settings.architecture("OlmoeForCausalLM")
    own = OlmoeConfig(
        experts=RoutedExperts.read(
            settings,
            num_experts=(64, "num_experts", "num_local_experts"),
            top_k=(8, "num_experts_per_tok"),
            expert_width=(2048, "intermediate_size"),
        ),
        norm_topk_prob=settings.flag("norm_topk_prob", False),
        attention_bias=settings.flag("attention_bias", False),
        clip_qkv=None if config.get("clip_qkv") is None else settings.real("clip_qkv", 1.0),
    )
    kinds = settings.value("layer_types", default=[])
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise CheckpointError(
            f"config.json: layer_types {kinds!r} of olmoe must all be full_attention"
        )
    shared = model_config(settings, model_type="olmoe", heads=_heads(settings), defaults=_DEFAULTS)
    return OlmoeFamily(shared, own)


def _heads(settings: ConfigReader) -> AttentionHeads:
    heads = AttentionHeads.read(settings, default_hidden=_DEFAULTS.hidden_size, default_heads=16)
    hidden = settings.integer("hidden_size", default=_DEFAULTS.hidden_size)
    if heads.head_dim * heads.num_heads != hidden:
        raise CheckpointError(
            f"config.json: hidden_size {hidden} must be num_attention_heads {heads.num_heads} "
            f"times an even head_dim (here {heads.head_dim})"
        )
    return heads


class OlmoeFamily(Family):
    def __init__(self, config: ModelConfig, olmoe: OlmoeConfig) -> None:
        super().__init__(config, olmoe.experts.banks(config))
        self.olmoe = olmoe

    def layer_parts(self, layer: int) -> dict[str, TensorPart]:
        config, prefix = self.config, f"model.layers.{layer}"
        width = config.hidden_size
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        return {
            **norm_parts(prefix, config),
            "q_norm": part(f"{prefix}.self_attn.q_norm.weight", q),
            "k_norm": part(f"{prefix}.self_attn.k_norm.weight", kv),
            "router": part(f"{prefix}.mlp.gate.weight", self.olmoe.experts.num_experts, width),
        } | projection_parts(f"{prefix}.self_attn", config, self.olmoe.attention_bias)

    def make_layer(self, layer: int, loader: Loader) -> DecoderLayer:
        own = self.olmoe
        routing = own.experts.routing(layer, "softmax", is_normed=own.norm_topk_prob)
        return dense_attention_layer(
            self.config,
            loader,
            router=Router(routing=routing, linear=loader.router("router")),
            qk_norm=loader.tensor("q_norm", "k_norm"),
            clip=own.clip_qkv,
        )
