"""A fourth model family, made as ``docs/how-to/adding-a-model.md`` shows.

Plain attention, experts by a softmax of the best logits. Nothing but its registry line knows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workers.model.attention_sublayer import DenseProjections, TorchAttentionSublayer
from workers.model.config import BankSpec, ModelConfig, TensorPart
from workers.model.families.base import Family, Loader
from workers.model.families.config_reader import (
    AttentionHeads,
    ConfigReader,
    Defaults,
    model_config,
)
from workers.model.families.decoder import DecoderLayer
from workers.model.families.parts import attention_shape, mlp_exchange, part, projection_parts
from workers.model.routing import Router, Routing

CONFIG: Mapping[str, Any] = {
    "model_type": "toy",
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "intermediate_size": 16,
    "torch_dtype": "float32",
}
"""A small one."""
_DEFAULTS = Defaults(
    vocab_size=128, hidden_size=32, num_layers=2, max_positions=256, rms_norm_eps=1e-5
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ToyConfig:
    """Its own numbers."""

    num_experts: int
    top_k: int
    expert_width: int


def family(config: Mapping[str, Any]) -> ToyFamily:
    """Read ``config.json``."""
    settings = ConfigReader(config)
    settings.architecture("ToyForCausalLM")
    own = ToyConfig(
        num_experts=settings.integer("num_experts"),
        top_k=settings.integer("num_experts_per_tok"),
        expert_width=settings.integer("intermediate_size"),
    )
    hidden, heads = settings.integer("hidden_size"), settings.integer("num_attention_heads")
    shape = AttentionHeads(
        num_heads=heads,
        num_kv_heads=settings.integer("num_key_value_heads"),
        head_dim=hidden // heads,
    )
    return ToyFamily(model_config(settings, model_type="toy", heads=shape, defaults=_DEFAULTS), own)


class ToyFamily(Family):
    """``Family`` of a toy checkpoint."""

    def __init__(self, config: ModelConfig, toy: ToyConfig) -> None:
        exchange = mlp_exchange(config, toy.expert_width)
        banks = tuple(
            BankSpec(
                index=layer,
                bank="mlp",
                layer=layer,
                num_experts=toy.num_experts,
                top_k=toy.top_k,
                exchanges=(exchange,),
            )
            for layer in range(config.num_layers)
        )
        super().__init__(config, banks)
        self.toy = toy

    def layer_parts(self, layer: int) -> dict[str, TensorPart]:
        prefix, width = f"model.layers.{layer}", self.config.hidden_size
        return {
            "norm1": part(f"{prefix}.input_layernorm.weight", width),
            "norm2": part(f"{prefix}.post_attention_layernorm.weight", width),
            "router": part(f"{prefix}.mlp.gate.weight", self.toy.num_experts, width),
        } | projection_parts(f"{prefix}.self_attn", self.config, has_bias=False)

    def make_layer(self, layer: int, loader: Loader) -> DecoderLayer:
        routing = Routing(
            bank=layer,
            num_experts=self.toy.num_experts,
            top_k=self.toy.top_k,
            scoring="softmax_of_best",
        )
        half = TorchAttentionSublayer(
            shape=attention_shape(self.config),
            norm1=loader.tensor("norm1"),
            projections=DenseProjections(
                qkv=loader.linear("q", "k", "v"), output=loader.linear("o")
            ),
            norm2=loader.tensor("norm2"),
            router=Router(routing=routing, linear=loader.linear("router")),
            attend=loader.attend,
        )
        return DecoderLayer(half=loader.blocks.sublayer(half))
