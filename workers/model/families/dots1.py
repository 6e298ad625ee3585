"""dots.llm1: per-head q/k norms, sliding windows, dense first layers, a sigmoid router in groups.

Shared experts and dense layers belong to the attention worker, routed experts to the banks.

Source: checkpoint layout and math as in transformers ``models/dots1``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cluster.core.errors import CheckpointError
from workers.model.config import BankSpec, ModelConfig, TensorPart
from workers.model.families.base import Family, Loader
from workers.model.families.decoder import DecoderLayer
from workers.model.families.parts import (
    attention_shape,
    mlp_exchange,
    mlp_parts,
    part,
    projection_parts,
)
from workers.model.families.settings import Defaults, Heads, Settings, model_config
from workers.model.half import AttentionHalf, DenseProjections
from workers.model.routing import Router, Routing

_DEFAULTS = Defaults(
    vocab_size=152064, hidden_size=4608, num_layers=62, max_positions=2048, rms_norm_eps=1e-6
)
_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, kw_only=True, slots=True)
class Dots1Config:
    """The numbers that dots.llm1 adds to ``ModelConfig``."""

    num_experts: int
    """E: routed experts of a layer."""
    top_k: int
    expert_width: int
    """I: inner width of a routed expert."""
    num_shared_experts: int
    """Experts that see every token; they are one MLP of so many times the width."""
    dense_width: int
    """Inner width of the MLP of a dense layer."""
    num_dense_layers: int
    """Layers before the first one with experts."""
    num_groups: int
    """Groups of neighbouring experts."""
    top_groups: int
    """Groups that a token's experts come from."""
    norm_topk_prob: bool
    """Weights of the chosen experts are scaled to sum 1."""
    scaling_factor: float
    """Multiplies the weights last."""
    attention_bias: bool
    """Biases on q, k, v and o."""
    windows: tuple[int | None, ...]
    """By layer, positions that a token looks at; None: all."""


def family(config: Mapping[str, Any]) -> Dots1Family:
    """Read ``config.json``. Raises ``CheckpointError`` naming the key we cannot serve."""
    settings = Settings(config)
    settings.architecture("Dots1ForCausalLM")
    own = Dots1Config(
        num_experts=settings.integer("n_routed_experts", "num_local_experts"),
        top_k=settings.integer("num_experts_per_tok"),
        expert_width=settings.integer("moe_intermediate_size", default=1408),
        num_shared_experts=settings.integer("n_shared_experts"),
        dense_width=settings.integer("intermediate_size", default=10944),
        num_dense_layers=settings.integer("first_k_dense_replace", default=0, least=0),
        num_groups=settings.integer("n_group", default=1),
        top_groups=settings.integer("topk_group", default=1),
        norm_topk_prob=settings.flag("norm_topk_prob", False),
        scaling_factor=settings.real("routed_scaling_factor", 1.0),
        attention_bias=settings.flag("attention_bias", False),
        windows=_windows(settings),
    )
    _check_groups(own)
    if own.num_dense_layers >= len(own.windows):
        raise CheckpointError(
            f"config.json: first_k_dense_replace {own.num_dense_layers} leaves no layer with "
            f"experts of num_hidden_layers {len(own.windows)}"
        )
    heads = Heads.read(settings, default_hidden=_DEFAULTS.hidden_size, default_heads=32)
    shared = model_config(settings, model_type="dots1", heads=heads, defaults=_DEFAULTS)
    return Dots1Family(shared, own)


def _windows(settings: Settings) -> tuple[int | None, ...]:
    """By layer. null for ``sliding_window`` turns it off; where it is absent it is 4096."""
    layers = settings.integer("num_hidden_layers", default=_DEFAULTS.num_layers)
    given = settings.value("sliding_window")
    is_off = given is None and "sliding_window" in settings.raw
    width = None if is_off else settings.integer("sliding_window", default=4096)
    first = settings.integer("max_window_layers", default=62, least=0)
    kinds = settings.value("layer_types")
    if kinds is None:
        kinds = [_SLIDING if width and i >= first else _FULL for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise CheckpointError(f"config.json: layer_types must list all {layers} layers")
    for kind in kinds:
        if kind not in (_SLIDING, _FULL):
            raise CheckpointError(
                f"config.json: layer_types {kind!r} is not supported: it is not {_SLIDING}, {_FULL}"
            )
    if width is None and _SLIDING in kinds:
        raise CheckpointError("config.json: layer_types has sliding layers, sliding_window is null")
    return tuple(width if kind == _SLIDING else None for kind in kinds)


def _check_groups(own: Dots1Config) -> None:
    """Raise ``CheckpointError`` unless every token finds its experts in the groups it may use."""
    size = own.num_experts // own.num_groups
    if own.num_experts % own.num_groups or (own.num_groups > 1 and size < 2):
        raise CheckpointError(
            f"config.json: n_routed_experts {own.num_experts} must be a multiple of "
            f"n_group {own.num_groups}, with at least 2 experts in a group"
        )
    if own.top_groups > own.num_groups:
        raise CheckpointError(
            f"config.json: topk_group {own.top_groups} exceeds n_group {own.num_groups}"
        )
    if own.top_k > own.top_groups * size:
        raise CheckpointError(
            f"config.json: num_experts_per_tok {own.top_k} exceeds the {own.top_groups * size} "
            f"experts of topk_group {own.top_groups} groups"
        )


class Dots1Family(Family):
    def __init__(self, config: ModelConfig, dots1: Dots1Config) -> None:
        exchange = mlp_exchange(config, dots1.expert_width)
        banks = tuple(
            BankSpec(
                index=index,
                bank="mlp",
                layer=layer,
                num_experts=dots1.num_experts,
                top_k=dots1.top_k,
                exchanges=(exchange,),
                float32_weights=True,
            )
            for index, layer in enumerate(range(dots1.num_dense_layers, config.num_layers))
        )
        super().__init__(config, banks)
        self.dots1 = dots1
        self.windows = frozenset(width for width in dots1.windows if width is not None)

    def layer_parts(self, layer: int) -> dict[str, TensorPart]:
        """See ``Family``. gate, up and down: the dense MLP, or the shared experts."""
        config, own, prefix = self.config, self.dots1, f"model.layers.{layer}"
        width = config.hidden_size
        parts = {
            "norm1": part(f"{prefix}.input_layernorm.weight", width),
            "norm2": part(f"{prefix}.post_attention_layernorm.weight", width),
            "q_norm": part(f"{prefix}.self_attn.q_norm.weight", config.head_dim),
            "k_norm": part(f"{prefix}.self_attn.k_norm.weight", config.head_dim),
        } | projection_parts(f"{prefix}.self_attn", config, own.attention_bias)
        if layer < own.num_dense_layers:
            return parts | mlp_parts(f"{prefix}.mlp", width, own.dense_width)
        shared = own.expert_width * own.num_shared_experts
        return (
            parts
            | {
                "router": part(f"{prefix}.mlp.gate.weight", own.num_experts, width),
                "correction": part(f"{prefix}.mlp.gate.e_score_correction_bias", own.num_experts),
            }
            | mlp_parts(f"{prefix}.mlp.shared_experts", width, shared)
        )

    def make_layer(self, layer: int, loader: Loader) -> DecoderLayer:
        own = self.dots1
        half = AttentionHalf(
            shape=attention_shape(self.config, window=own.windows[layer]),
            norm1=loader.tensor("norm1"),
            projections=DenseProjections(
                qkv=loader.linear("q", "k", "v"), output=loader.linear("o")
            ),
            qk_norm=self._qk_norm(loader),
            norm2=loader.tensor("norm2"),
            router=self._router(layer, loader) if layer >= own.num_dense_layers else None,
            attend=loader.attend,
        )
        mlp = loader.mlp("gate", "up", "down", self.config.activation)
        return DecoderLayer(half=loader.blocks.half(half), mlp=mlp)

    def _router(self, layer: int, loader: Loader) -> Router:
        own = self.dots1
        routing = Routing(
            bank=layer - own.num_dense_layers,
            num_experts=own.num_experts,
            top_k=own.top_k,
            scoring="sigmoid",
            is_normed=own.norm_topk_prob,
            scale=own.scaling_factor,
            num_groups=own.num_groups,
            top_groups=own.top_groups,
        )
        return Router(
            routing=routing,
            linear=loader.float32_linear("router"),
            correction=loader.tensor("correction", dtype=torch.float32),
        )

    def _qk_norm(self, loader: Loader) -> Tensor:
        """[A + K, D]: the one weight of all query heads, and that of all key heads, repeated."""
        queries, keys = loader.tensor("q_norm"), loader.tensor("k_norm")
        heads = (
            queries.expand(self.config.num_heads, -1),
            keys.expand(self.config.num_kv_heads, -1),
        )
        return torch.cat(heads)
