"""JetMoE: attention and MLP are both mixtures of experts, so a layer has three exchanges.

The attention experts hold query and output projections; a token's top-k choice is made once and
used for both. All attention experts share keys and values, which belong to the attention worker.

Source: checkpoint layout and math as in transformers ``models/jetmoe``.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from workers.model.attention_sublayer import (
    OUTPUT_EXCHANGE,
    QUERY_EXCHANGE,
    RoutedProjections,
    TorchAttentionSublayer,
)
from workers.model.config import BankSpec, ExchangeSpec, ExpertMatrix, ModelConfig, TensorPart
from workers.model.families.base import Family, Loader
from workers.model.families.config_reader import (
    AttentionHeads,
    ConfigReader,
    Defaults,
    check_top_k,
    model_config,
)
from workers.model.families.decoder import DecoderLayer
from workers.model.families.parts import attention_shape, mlp_exchange, part
from workers.model.routing import Router, Routing

_DEFAULTS = Defaults(
    vocab_size=32000,
    hidden_size=2048,
    num_layers=12,
    max_positions=4096,
    rms_norm_eps=1e-6,
    tied=True,
    eos=(2,),
)
_CLASSIFIER = "JetMoeForSequenceClassification"
_BLOCK_EPS = 1e-6
"""Epsilon of the norms within layers; only the final norm uses ``rms_norm_eps``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JetMoeConfig:
    """Settings of JetMoE beyond ``ModelConfig``."""

    num_experts: int
    """E: number of experts of each of a layer's two banks."""
    top_k: int
    """Number of experts selected for each token; also the number of query heads per key head."""
    expert_width: int
    """I: inner width of an MLP expert."""


def family(config: Mapping[str, Any]) -> JetMoeFamily:
    """Return the model that ``config`` describes. Raises ``CheckpointError`` if unsupported."""
    settings = ConfigReader(config)
    architecture = settings.architecture("JetMoeForCausalLM", "JetMoEForCausalLM", _CLASSIFIER)
    own = JetMoeConfig(
        num_experts=settings.integer("num_local_experts", default=8),
        top_k=settings.integer("num_experts_per_tok", default=2),
        expert_width=settings.integer("intermediate_size", default=5632),
    )
    check_top_k("num_experts_per_tok", own.top_k, "num_local_experts", own.num_experts)
    num_kv_heads = settings.integer("num_key_value_heads", default=16)
    settings.value("num_attention_heads")  # known keys, but computed from the two values above
    shared = model_config(
        settings,
        model_type="jetmoe",
        heads=AttentionHeads(
            num_heads=num_kv_heads * own.top_k,
            num_kv_heads=num_kv_heads,
            head_dim=settings.integer("kv_channels", "head_dim", default=128),
            are_tiled=True,
        ),
        defaults=_DEFAULTS,
        activation_keys=("activation_function",),
        is_classifier=architecture == _CLASSIFIER,
    )
    return JetMoeFamily(shared, own)


class JetMoeFamily(Family):
    """JetMoE model family. Bank 2l has layer l's attention experts, bank 2l + 1 its MLP experts."""

    def __init__(self, config: ModelConfig, jetmoe: JetMoeConfig) -> None:
        exchanges = _attention_exchanges(config), (mlp_exchange(config, jetmoe.expert_width),)
        banks = tuple(
            BankSpec(
                index=2 * layer + kind,
                bank=name,
                layer=layer,
                num_experts=jetmoe.num_experts,
                top_k=jetmoe.top_k,
                exchanges=exchanges[kind],
                aux_copies=2 if name == "attention" else 1,
                aux_dtype="float32",
            )
            for layer in range(config.num_layers)
            for kind, name in enumerate(("attention", "mlp"))
        )
        super().__init__(config, banks)
        self.jetmoe = jetmoe

    def expert_matrices(
        self, bank: BankSpec, exchange: int, expert: int, names: Container[str]
    ) -> tuple[ExpertMatrix, ...]:
        """Return the tensor parts of one expert's matrices; a tensor holds all experts."""
        spec = bank.exchanges[exchange]
        place = "mlp" if bank.bank == "mlp" else "self_attention.experts"
        linears = {"mlp": ("input", "output"), "query": ("input",), "output": ("output",)}
        found = []
        for linear, shape in zip(linears[spec.name], spec.matrix_shapes, strict=True):
            name = f"model.layers.{bank.layer}.{place}.{linear}_linear.weight"
            stored = part(name, bank.num_experts, *shape, index=expert)
            found.append(ExpertMatrix(shape=shape, parts=(stored,)))
        return tuple(found)

    def layer_parts(self, layer: int) -> dict[str, TensorPart]:
        config, prefix = self.config, f"model.layers.{layer}"
        width, num_experts = config.hidden_size, self.jetmoe.num_experts
        both = 2 * config.num_kv_heads * config.head_dim
        attention, mlp = f"{prefix}.self_attention.experts", f"{prefix}.mlp"
        return {
            "norm1": part(f"{prefix}.input_layernorm.weight", width),
            "norm2": part(f"{prefix}.post_attention_layernorm.weight", width),
            "kv": part(f"{prefix}.self_attention.kv_proj.weight", both, width),
            "attention_router": part(f"{attention}.router.layer.weight", num_experts, width),
            "attention_bias": part(f"{attention}.bias", width),
            "mlp_router": part(f"{mlp}.router.layer.weight", num_experts, width),
            "mlp_bias": part(f"{mlp}.bias", width),
        }

    def make_layer(self, layer: int, loader: Loader) -> DecoderLayer:
        half = TorchAttentionSublayer(
            shape=attention_shape(self.config, eps=_BLOCK_EPS),
            norm1=loader.tensor("norm1"),
            projections=RoutedProjections(
                router=self._router("attention_router", 2 * layer, loader),
                kv=loader.linear("kv"),
                bias=loader.tensor("attention_bias"),
            ),
            norm2=loader.tensor("norm2"),
            router=self._router("mlp_router", 2 * layer + 1, loader),
            attend=loader.attend,
        )
        return DecoderLayer(half=loader.blocks.sublayer(half), bias=loader.tensor("mlp_bias"))

    def _router(self, name: str, bank: int, loader: Loader) -> Router:
        own = self.jetmoe
        routing = Routing(
            bank=bank, num_experts=own.num_experts, top_k=own.top_k, scoring="softmax_of_best"
        )
        return Router(routing=routing, linear=loader.router(name))


def _attention_exchanges(config: ModelConfig) -> tuple[ExchangeSpec, ...]:
    """Return the query exchange (k outputs per row) and the output exchange (k inputs per row)."""
    inner = config.num_kv_heads * config.head_dim
    return (
        ExchangeSpec(
            index=QUERY_EXCHANGE,
            name="query",
            in_width=config.hidden_size,
            out_width=inner,
            weighted=False,
            expert_kind="linear",
        ),
        ExchangeSpec(
            index=OUTPUT_EXCHANGE,
            name="output",
            in_width=inner,
            out_width=config.hidden_size,
            per_slot_input=True,
            expert_kind="linear",
        ),
    )
