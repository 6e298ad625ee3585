"""GLM-4.5 to 4.7: a sigmoid router in groups, a part of each head rotated, dense first layers.

The checkpoint has prediction layers (MTP) after the last layer; only the first can be loaded.

Source: checkpoint layout and math as in transformers ``models/glm4_moe``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from workers.model.config import ModelConfig, TensorPart
from workers.model.families.base import Family, Loader
from workers.model.families.config_reader import (
    AttentionHeads,
    ConfigReader,
    Defaults,
    model_config,
)
from workers.model.families.decoder import DecoderLayer, dense_attention_layer
from workers.model.families.grouped_experts import GroupDefaults, GroupedExperts
from workers.model.families.parts import (
    head_norm_parts,
    head_norms,
    norm_parts,
    projection_parts,
)
from workers.model.families.predictor import predicting

_DEFAULTS = Defaults(
    vocab_size=151552,
    hidden_size=4096,
    num_layers=46,
    max_positions=131072,
    rms_norm_eps=1e-5,
    rotary_share=0.5,
)
_EXPERTS = GroupDefaults(
    num_experts=128, top_k=8, num_shared_experts=1, num_dense_layers=1, norm_topk_prob=True
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Glm4MoeConfig:
    """Settings of GLM-4.5 beyond ``ModelConfig``."""

    experts: GroupedExperts
    attention_bias: bool
    """Whether q, k and v have biases."""
    use_qk_norm: bool
    """Whether each head of queries and keys is normalised."""


def family(config: Mapping[str, Any]) -> Glm4MoeFamily:
    """Return the model that ``config`` describes. Raises ``CheckpointError`` if unsupported."""
    settings = ConfigReader(config)
    settings.architecture("Glm4MoeForCausalLM")
    num_layers = settings.integer("num_hidden_layers", default=_DEFAULTS.num_layers)
    own = Glm4MoeConfig(
        experts=GroupedExperts.read(settings, _EXPERTS, num_layers),
        attention_bias=settings.flag("attention_bias", False),
        use_qk_norm=settings.flag("use_qk_norm", False),
    )
    heads = AttentionHeads.read(
        settings, default_hidden=_DEFAULTS.hidden_size, default_heads=96, default_kv_heads=8
    )
    shared = model_config(settings, model_type="glm4_moe", heads=heads, defaults=_DEFAULTS)
    return Glm4MoeFamily(shared, own)


class Glm4MoeFamily(Family):
    def __init__(self, config: ModelConfig, glm: Glm4MoeConfig) -> None:
        super().__init__(config, glm.experts.banks(config))
        self.glm = glm

    def with_predictor(self) -> Glm4MoeFamily:
        config = predicting(self.config)
        experts = self.glm.experts.with_layer(config.num_layers)
        return Glm4MoeFamily(config, replace(self.glm, experts=experts))

    def layer_parts(self, layer: int) -> dict[str, TensorPart]:
        """Return a layer's tensors; ``gate``, ``up``, ``down``: dense MLP or shared experts."""
        config, own, prefix = self.config, self.glm, f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        return {
            **norm_parts(prefix, config),
            **(head_norm_parts(attention, config) if own.use_qk_norm else {}),
            **projection_parts(attention, config, own.attention_bias, has_output_bias=False),
            **own.experts.parts(layer, config.hidden_size),
        }

    def make_layer(self, layer: int, loader: Loader) -> DecoderLayer:
        own, norms = self.glm, None
        if own.use_qk_norm:
            norms = head_norms(self.config, loader.tensor("q_norm"), loader.tensor("k_norm"))
        router = own.experts.router(layer, loader)
        return dense_attention_layer(self.config, loader, router=router, qk_norm=norms)
