"""Multi-head latent attention: its settings in ``config.json``, and loading of its tensors.

Source: checkpoint layout and math as in transformers ``models/deepseek_v3``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cluster.core.errors import CheckpointError
from workers.model.config import ModelConfig, TensorPart
from workers.model.families.base import Loader
from workers.model.families.config_reader import (
    AttentionHeads,
    ConfigReader,
    Defaults,
    model_config,
)
from workers.model.families.parts import part
from workers.model.latent import LatentProjections, LatentShape
from workers.model.layers import LayerContext, Linear, Norm
from workers.model.rope import context_scale, rope_number, rope_parameters, rotation_order

_NORM_EPS = 1e-6
"""Epsilon of the norms of latent vectors, independent of ``rms_norm_eps``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentDefaults:
    """A model family's default dimensions of multi-head latent attention."""

    num_heads: int
    query_rank: int = 1536
    rank: int = 512
    plain_dim: int = 128
    rotated_dim: int = 64
    value_dim: int = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttention:
    """Settings of multi-head latent attention, the same for all layers of a model."""

    shape: LatentShape
    query_rank: int | None
    """Elements of the queries' latent vector; None: queries come from the hidden state."""
    has_bias: bool
    """Whether projections to latent vectors and the output projection have biases."""

    @classmethod
    def read(cls, settings: ConfigReader, defaults: LatentDefaults) -> LatentAttention:
        """Read the settings. Raises ``CheckpointError`` naming the unsupported key."""
        num_heads = settings.integer("num_attention_heads", default=defaults.num_heads)
        num_keys = settings.integer("num_key_value_heads", default=num_heads)
        if num_keys != num_heads:
            raise CheckpointError(
                f"config.json: num_key_value_heads {num_keys} must be num_attention_heads "
                f"{num_heads}: all heads have their keys from one latent vector"
            )
        plain_dim = settings.integer("qk_nope_head_dim", default=defaults.plain_dim)
        rotated_dim = settings.integer("qk_rope_head_dim", default=defaults.rotated_dim)
        settings.only("head_dim", rotated_dim)  # as transformers names it
        settings.only("qk_head_dim", plain_dim + rotated_dim)
        if rotated_dim % 2:
            raise CheckpointError(f"config.json: qk_rope_head_dim {rotated_dim} must be even")
        shape = LatentShape(
            num_heads=num_heads,
            rank=settings.integer("kv_lora_rank", default=defaults.rank),
            plain_dim=plain_dim,
            rotated_dim=rotated_dim,
            value_dim=settings.integer("v_head_dim", default=defaults.value_dim),
            scale=(plain_dim + rotated_dim) ** -0.5 * _score_scale(settings.raw) ** 2,
        )
        has_rank = "q_lora_rank" not in settings.raw or settings.value("q_lora_rank") is not None
        rank = settings.integer("q_lora_rank", default=defaults.query_rank) if has_rank else None
        has_bias = settings.flag("attention_bias", False)
        return cls(shape=shape, query_rank=rank, has_bias=has_bias)

    def config(self, settings: ConfigReader, model_type: str, defaults: Defaults) -> ModelConfig:
        """Read the config that all families share. Must be called last: it checks unread keys."""
        shape = self.shape
        return model_config(
            settings,
            model_type=model_type,
            heads=AttentionHeads(
                num_heads=shape.num_heads, num_kv_heads=1, head_dim=shape.rank + shape.rotated_dim
            ),
            defaults=defaults,
            latent_rank=shape.rank,
        )

    def parts(self, prefix: str, width: int) -> dict[str, TensorPart]:
        """Return the tensors of a layer's attention, by short name."""
        shape, rank = self.shape, self.query_rank
        queries = shape.num_heads * shape.query_dim
        made = shape.num_heads * (shape.plain_dim + shape.value_dim)
        parts = {
            "latent": part(f"{prefix}.kv_a_proj_with_mqa.weight", shape.cached_dim, width),
            "latent_norm": part(f"{prefix}.kv_a_layernorm.weight", shape.rank),
            "heads": part(f"{prefix}.kv_b_proj.weight", made, shape.rank),
            "o": part(f"{prefix}.o_proj.weight", width, shape.num_heads * shape.value_dim),
        }
        if rank is None:
            parts["q"] = part(f"{prefix}.q_proj.weight", queries, width)
        else:
            parts["query_latent"] = part(f"{prefix}.q_a_proj.weight", rank, width)
            parts["query_norm"] = part(f"{prefix}.q_a_layernorm.weight", rank)
            parts["q"] = part(f"{prefix}.q_b_proj.weight", queries, rank)
        if self.has_bias:
            parts["latent_bias"] = part(f"{prefix}.kv_a_proj_with_mqa.bias", shape.cached_dim)
            parts["o_bias"] = part(f"{prefix}.o_proj.bias", width)
            if rank is not None:
                parts["query_latent_bias"] = part(f"{prefix}.q_a_proj.bias", rank)
        return parts

    def projections(self, config: ModelConfig, loader: Loader, norm1: Tensor) -> LatentProjections:
        """Load a layer's latent attention; ``norm1`` [H]: weight of the norm before attention."""
        shape, blocks = self.shape, loader.blocks
        order = rotation_order(config.rope)
        weight = loader.weight("heads").view(-1, shape.plain_dim + shape.value_dim, shape.rank)
        return LatentProjections(
            shape=shape,
            norm1=blocks.norm(norm1, config.rms_norm_eps),
            queries=self._queries(order, loader),
            latents=loader.linear("latent", order=_ends_ordered(order, 1, shape.rank)),
            latent_norm=blocks.norm(loader.tensor("latent_norm"), _NORM_EPS),
            heads=blocks.head_products(weight, shape.plain_dim),
            can_expand=not blocks.are_exact,
            output=loader.linear("o"),
        )

    def _queries(self, order: Tensor, loader: Loader) -> Callable[[Tensor, LayerContext], Tensor]:
        shape = self.shape
        rows = _ends_ordered(order, shape.num_heads, shape.plain_dim)
        queries = loader.linear("q", order=rows)
        if self.query_rank is None:
            return partial(_direct, product=queries)
        norm = loader.blocks.norm(loader.tensor("query_norm"), _NORM_EPS)
        return partial(_by_rank, first=loader.linear("query_latent"), norm=norm, second=queries)


def _direct(x: Tensor, context: LayerContext, product: Linear) -> Tensor:
    return context.multiply(product, x)


def _by_rank(x: Tensor, context: LayerContext, first: Linear, norm: Norm, second: Linear) -> Tensor:
    return context.multiply(second, norm(context.multiply(first, x)))


def _ends_ordered(order: Tensor, num_heads: int, first: int) -> Tensor:
    """Return the order of rows that applies ``order`` to each head from element ``first`` on."""
    head = torch.cat((torch.arange(first), first + order))
    return (torch.arange(num_heads).unsqueeze(1) * len(head) + head).flatten()


def _score_scale(config: Mapping[str, Any]) -> float:
    """Return the factor of queries and keys that ``mscale_all_dim`` requests; 1.0 if absent."""
    params = rope_parameters(config)
    kind = params.get("rope_type") or params.get("type") or "default"
    mscale, factor = params.get("mscale_all_dim"), params.get("factor")
    if kind == "default" or not mscale:
        return 1.0
    if not isinstance(mscale, int | float) or not isinstance(factor, int | float):
        raise CheckpointError(
            f"config.json: mscale_all_dim {mscale!r} and factor {factor!r} of rope_scaling must be "
            "numbers"
        )
    mscale = rope_number("mscale_all_dim", mscale, 1.0)
    return context_scale(rope_number("factor", factor, 1.0), mscale)
