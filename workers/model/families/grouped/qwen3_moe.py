"""Qwen3-MoE: norms of each query and key head, a softmax router, dense layers among sparse ones.

Source: checkpoint layout and math as in transformers ``models/qwen3_moe``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workers.model.config import ModelConfig, TensorPart
from workers.model.families.base import Family, Loader
from workers.model.families.decoder import DecoderLayer, dense_attention_layer
from workers.model.families.parts import (
    head_norm_parts,
    head_norms,
    mlp_banks,
    mlp_parts,
    norm_parts,
    part,
    projection_parts,
)
from workers.model.families.settings import (
    Defaults,
    Heads,
    Settings,
    check_top_k,
    model_config,
    sparse_layers,
)
from workers.model.routing import Router, Routing

_DEFAULTS = Defaults(
    vocab_size=151936, hidden_size=2048, num_layers=24, max_positions=32768, rms_norm_eps=1e-6
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen3MoeConfig:
    """The numbers that Qwen3-MoE adds to ``ModelConfig``."""

    num_experts: int
    """E: routed experts of a layer."""
    top_k: int
    expert_width: int
    """I: inner width of an expert."""
    dense_width: int
    """Inner width of the MLP of a dense layer."""
    sparse_layers: tuple[int, ...]
    """Layers with experts; the others are dense."""
    norm_topk_prob: bool
    """Weights of the chosen experts are scaled to sum 1."""
    attention_bias: bool
    """Biases on q, k, v and o."""
    window: int | None
    """Positions that a token looks at in every layer; None: all."""


def family(config: Mapping[str, Any]) -> Qwen3MoeFamily:
    """Read ``config.json``. Raises ``CheckpointError`` naming the key we cannot serve."""
    settings = Settings(config)
    settings.architecture("Qwen3MoeForCausalLM")
    width = settings.integer("sliding_window", default=4096)
    own = Qwen3MoeConfig(
        num_experts=settings.integer("num_experts", "num_local_experts", default=128),
        top_k=settings.integer("num_experts_per_tok", default=8),
        expert_width=settings.integer("moe_intermediate_size", default=768),
        dense_width=settings.integer("intermediate_size", default=6144),
        sparse_layers=sparse_layers(
            settings, settings.integer("num_hidden_layers", default=_DEFAULTS.num_layers)
        ),
        norm_topk_prob=settings.flag("norm_topk_prob", False),
        attention_bias=settings.flag("attention_bias", False),
        window=width if settings.flag("use_sliding_window", False) else None,
    )
    check_top_k("num_experts_per_tok", own.top_k, "num_experts", own.num_experts)
    heads = Heads.read(
        settings, default_hidden=_DEFAULTS.hidden_size, default_heads=32, default_kv_heads=4
    )
    shared = model_config(settings, model_type="qwen3_moe", heads=heads, defaults=_DEFAULTS)
    return Qwen3MoeFamily(shared, own)


class Qwen3MoeFamily(Family):
    def __init__(self, config: ModelConfig, qwen3: Qwen3MoeConfig) -> None:
        banks = mlp_banks(
            config,
            qwen3.sparse_layers,
            num_experts=qwen3.num_experts,
            top_k=qwen3.top_k,
            expert_width=qwen3.expert_width,
            aux_copies=1,
        )
        super().__init__(config, banks)
        self.qwen3 = qwen3
        self.windows = frozenset(() if qwen3.window is None else (qwen3.window,))

    def layer_parts(self, layer: int) -> dict[str, TensorPart]:
        """See ``Family``. gate, up and down: the MLP of a dense layer."""
        config, own, prefix = self.config, self.qwen3, f"model.layers.{layer}"
        width = config.hidden_size
        parts = {
            **norm_parts(prefix, config),
            **head_norm_parts(f"{prefix}.self_attn", config),
            **projection_parts(f"{prefix}.self_attn", config, own.attention_bias),
        }
        if layer not in own.sparse_layers:
            return parts | mlp_parts(f"{prefix}.mlp", width, own.dense_width)
        return parts | {"router": part(f"{prefix}.mlp.gate.weight", own.num_experts, width)}

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
        if layer not in own.sparse_layers:
            return None
        routing = Routing(
            bank=own.sparse_layers.index(layer),
            num_experts=own.num_experts,
            top_k=own.top_k,
            scoring="softmax",
            is_normed=own.norm_topk_prob,
        )
        return Router(routing=routing, linear=loader.router("router"))
