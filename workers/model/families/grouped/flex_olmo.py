"""FlexOlmo: norms after attention and experts instead of before; q/k norms as in OLMoE.

Source: checkpoint layout and math as in transformers ``models/flex_olmo``. There, norms multiply by
their weight, and heads are rotated, in float32 before they are rounded to bfloat16; here each step
is rounded, as in all families.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from workers.model.attention_sublayer import HeadAttention, RowAttention
from workers.model.config import ModelConfig, TensorPart
from workers.model.families.base import Family, Loader
from workers.model.families.config_reader import (
    AttentionHeads,
    ConfigReader,
    Defaults,
    model_config,
)
from workers.model.families.parts import attention_shape, part, projection_parts
from workers.model.families.routed_experts import RoutedExperts
from workers.model.layers import Dispatch, LayerContext, LayerSteps, Linear, Norm
from workers.model.routing import Router

_DEFAULTS = Defaults(
    vocab_size=100352,
    hidden_size=4096,
    num_layers=32,
    max_positions=4096,
    rms_norm_eps=1e-6,
    rope_theta=500000.0,
    eos=(100257,),
    pad=100277,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FlexOlmoConfig:
    """Settings of FlexOlmo beyond ``ModelConfig``."""

    experts: RoutedExperts
    norm_topk_prob: bool
    """Whether the weights of the selected experts are scaled to sum 1."""
    attention_bias: bool
    """Whether q, k, v and o have biases."""


def family(config: Mapping[str, Any]) -> FlexOlmoFamily:
    """Return the model that ``config`` describes. Raises ``CheckpointError`` if unsupported."""
    settings = ConfigReader(config)
    settings.architecture("FlexOlmoForCausalLM")
    own = FlexOlmoConfig(
        experts=RoutedExperts.read(
            settings,
            num_experts=(7, "num_experts", "num_local_experts"),
            top_k=(5, "num_experts_per_tok"),
            expert_width=(11008, "intermediate_size"),
        ),
        norm_topk_prob=settings.flag("norm_topk_prob", False),
        attention_bias=settings.flag("attention_bias", False),
    )
    heads = AttentionHeads.read(settings, default_hidden=_DEFAULTS.hidden_size, default_heads=32)
    shared = model_config(settings, model_type="flex_olmo", heads=heads, defaults=_DEFAULTS)
    return FlexOlmoFamily(shared, own)


@dataclass(frozen=True, kw_only=True, slots=True)
class PostNormLayer:
    """Decoder layer with norms of outputs: h = x + norm1(attention(x)); h + norm2(experts(h))."""

    heads: RowAttention
    qkv: Linear
    output: Linear
    norm1: Norm
    norm2: Norm
    router: Router

    def forward(self, hidden: Tensor, cache: Tensor, context: LayerContext) -> LayerSteps:
        """Run the layer on hidden states [T, H]; see ``Layer``."""
        rows = context.multiply(self.qkv, hidden)
        attended = self.heads.attend_rows(rows, cache, context)
        hidden = hidden + self.norm1(context.multiply(self.output, attended))
        routes = self.router.route(hidden, context.attention.recorder)
        yield Dispatch(routes.bank, 0, hidden, routes.topk_ids, routes.topk_weights)
        routed = yield
        return hidden + self.norm2(routed)


class FlexOlmoFamily(Family):
    def __init__(self, config: ModelConfig, flex_olmo: FlexOlmoConfig) -> None:
        super().__init__(config, flex_olmo.experts.banks(config))
        self.flex_olmo = flex_olmo

    def layer_parts(self, layer: int) -> dict[str, TensorPart]:
        config, prefix = self.config, f"model.layers.{layer}"
        width, attention = config.hidden_size, f"{prefix}.self_attn"
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        return {
            "norm1": part(f"{prefix}.post_attention_layernorm.weight", width),
            "norm2": part(f"{prefix}.post_feedforward_layernorm.weight", width),
            "q_norm": part(f"{attention}.q_norm.weight", q),
            "k_norm": part(f"{attention}.k_norm.weight", kv),
            "router": part(f"{prefix}.mlp.gate.weight", self.flex_olmo.experts.num_experts, width),
        } | projection_parts(attention, config, self.flex_olmo.attention_bias)

    def make_layer(self, layer: int, loader: Loader) -> PostNormLayer:
        own, eps = self.flex_olmo, self.config.rms_norm_eps
        routing = own.experts.routing(layer, "softmax", is_normed=own.norm_topk_prob)
        heads = HeadAttention(
            shape=attention_shape(self.config),
            qk_norm=loader.tensor("q_norm", "k_norm"),
            attend=loader.attend,
        )
        return PostNormLayer(
            heads=loader.blocks.heads(heads, loader.dtype),
            qkv=loader.linear("q", "k", "v"),
            output=loader.linear("o"),
            norm1=loader.blocks.norm(loader.tensor("norm1"), eps),
            norm2=loader.blocks.norm(loader.tensor("norm2"), eps),
            router=Router(routing=routing, linear=loader.router("router")),
        )
