"""Qwen3-MoE: norms of each query and key head, a softmax router, dense layers among sparse ones.

Source: checkpoint layout and math as in transformers ``models/qwen3_moe``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workers.model.config import ModelConfig, TensorPart
from workers.model.families.base import Family, Loader
from workers.model.families.config_reader import (
    AttentionHeads,
    ConfigReader,
    Defaults,
    model_config,
    sparse_layers,
)
from workers.model.families.decoder import DecoderLayer, dense_attention_layer
from workers.model.families.parts import (
    head_norm_parts,
    head_norms,
    mlp_parts,
    norm_parts,
    part,
    projection_parts,
)
from workers.model.families.routed_experts import RoutedExperts
from workers.model.routing import Router

_DEFAULTS = Defaults(
    vocab_size=151936, hidden_size=2048, num_layers=24, max_positions=32768, rms_norm_eps=1e-6
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen3MoeConfig:
    """Settings of Qwen3-MoE beyond ``ModelConfig``."""

    experts: RoutedExperts
    dense_width: int
    """Inner width of the MLP of a dense layer."""
    norm_topk_prob: bool
    """Whether the weights of the selected experts are scaled to sum 1."""
    attention_bias: bool
    """Whether q, k, v and o have biases."""
    window: int | None
    """Width of every layer's sliding window in tokens; None: no window."""


def family(config: Mapping[str, Any]) -> Qwen3MoeFamily:
    """Return the model that ``config`` describes. Raises ``CheckpointError`` if unsupported."""
    settings = ConfigReader(config)
    settings.architecture("Qwen3MoeForCausalLM")
    width = settings.integer("sliding_window", default=4096)
    own = Qwen3MoeConfig(
        experts=RoutedExperts.read(
            settings,
            num_experts=(128, "num_experts", "num_local_experts"),
            top_k=(8, "num_experts_per_tok"),
            expert_width=(768, "moe_intermediate_size"),
            sparse_layers=sparse_layers(
                settings, settings.integer("num_hidden_layers", default=_DEFAULTS.num_layers)
            ),
        ),
        dense_width=settings.integer("intermediate_size", default=6144),
        norm_topk_prob=settings.flag("norm_topk_prob", False),
        attention_bias=settings.flag("attention_bias", False),
        window=width if settings.flag("use_sliding_window", False) else None,
    )
    heads = AttentionHeads.read(
        settings, default_hidden=_DEFAULTS.hidden_size, default_heads=32, default_kv_heads=4
    )
    shared = model_config(settings, model_type="qwen3_moe", heads=heads, defaults=_DEFAULTS)
    return Qwen3MoeFamily(shared, own)


class Qwen3MoeFamily(Family):
    def __init__(self, config: ModelConfig, qwen3: Qwen3MoeConfig) -> None:
        super().__init__(config, qwen3.experts.banks(config))
        self.qwen3 = qwen3
        self.windows = frozenset(() if qwen3.window is None else (qwen3.window,))

    def layer_parts(self, layer: int) -> dict[str, TensorPart]:
        """Return a layer's tensors; ``gate``, ``up``, ``down``: MLP of a dense layer."""
        config, own, prefix = self.config, self.qwen3, f"model.layers.{layer}"
        width = config.hidden_size
        parts = {
            **norm_parts(prefix, config),
            **head_norm_parts(f"{prefix}.self_attn", config),
            **projection_parts(f"{prefix}.self_attn", config, own.attention_bias),
        }
        if not own.experts.is_in(layer):
            return parts | mlp_parts(f"{prefix}.mlp", width, own.dense_width)
        return parts | {"router": part(f"{prefix}.mlp.gate.weight", own.experts.num_experts, width)}

    def make_layer(self, layer: int, loader: Loader) -> DecoderLayer:
        return dense_attention_layer(
            self.config,
            loader,
            router=self._router(layer, loader),
            qk_norm=head_norms(self.config, loader.tensor("q_norm"), loader.tensor("k_norm")),
            window=self.qwen3.window,
        )

    def _router(self, layer: int, loader: Loader) -> Router | None:
        own = self.qwen3
        if not own.experts.is_in(layer):
            return None
        routing = own.experts.routing(layer, "softmax", is_normed=own.norm_topk_prob)
        return Router(routing=routing, linear=loader.router("router"))
