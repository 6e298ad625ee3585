"""Mixtral: no norms of heads, a softmax over the selected experts, an optional window.

Source: checkpoint layout and math as in transformers ``models/mixtral``. There the experts' weights
stay float32 in a bfloat16 model; here they are rounded, as in the other softmax routers.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

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
    vocab_size=32000,
    hidden_size=4096,
    num_layers=32,
    max_positions=131072,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    eos=(2,),
)


def family(config: Mapping[str, Any]) -> MixtralFamily:
    """Return the model that ``config`` describes. Raises ``CheckpointError`` if unsupported."""
    settings = ConfigReader(config)
    settings.architecture("MixtralForCausalLM")
    has_window = settings.value("sliding_window") is not None
    experts = RoutedExperts.read(
        settings,
        num_experts=(8, "num_local_experts", "num_experts"),
        top_k=(2, "num_experts_per_tok"),
        expert_width=(14336, "intermediate_size"),
    )
    window = settings.integer("sliding_window") if has_window else None
    heads = AttentionHeads.read(
        settings, default_hidden=_DEFAULTS.hidden_size, default_heads=32, default_kv_heads=8
    )
    shared = model_config(settings, model_type="mixtral", heads=heads, defaults=_DEFAULTS)
    return MixtralFamily(shared, experts, window)


class MixtralFamily(Family):
    def __init__(self, config: ModelConfig, experts: RoutedExperts, window: int | None) -> None:
        """``window``: width of every layer's sliding window in tokens; None: no window."""
        super().__init__(config, experts.banks(config))
        self.experts, self.window = experts, window
        self.windows = frozenset(() if window is None else (window,))

    def expert_matrices(
        self, bank: BankSpec, exchange: int, expert: int, names: Container[str]
    ) -> tuple[ExpertMatrix, ...]:
        """Return the tensor parts that make up one expert's matrices; see ``Family``."""
        return block_sparse_expert(bank, expert)

    def layer_parts(self, layer: int) -> dict[str, TensorPart]:
        config, prefix = self.config, f"model.layers.{layer}"
        width, experts = config.hidden_size, self.experts.num_experts
        return {
            **norm_parts(prefix, config),
            "router": part(f"{prefix}.block_sparse_moe.gate.weight", experts, width),
        } | projection_parts(f"{prefix}.self_attn", config, has_bias=False)

    def make_layer(self, layer: int, loader: Loader) -> DecoderLayer:
        routing = self.experts.routing(layer, "softmax_of_best")
        return dense_attention_layer(
            self.config,
            loader,
            router=Router(routing=routing, linear=loader.router("router")),
            window=self.window,
        )
