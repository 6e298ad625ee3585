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
from workers.model.families.parts import (
    mlp_exchange,
    mlp_parts,
    part,
    projection_parts,
)
from workers.model.families.settings import Defaults, Heads, Settings, model_config
from workers.model.layers import (
    Attend,
    Dispatch,
    GatedMlp,
    LayerContext,
    LayerSteps,
    Linear,
    rms_norm,
    row_sigmoid,
)
from workers.model.rope import rotate

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

    def make_layer(self, layer: int, loader: Loader, attend: Attend) -> Dots1Layer:
        own = self.dots1
        router = None
        if layer >= own.num_dense_layers:
            router = Dots1Router(
                config=own,
                bank=layer - own.num_dense_layers,
                linear=loader.float32_linear("router"),
                correction=loader.tensor("correction", dtype=torch.float32),
            )
        return Dots1Layer(
            config=self.config,
            window=own.windows[layer],
            norm1=loader.tensor("norm1"),
            qkv=loader.linear("q", "k", "v"),
            qk_norm=self._qk_norm(loader),
            output=loader.linear("o"),
            norm2=loader.tensor("norm2"),
            mlp=loader.mlp("gate", "up", "down", self.config.activation),
            router=router,
            attend=attend,
        )

    def _qk_norm(self, loader: Loader) -> Tensor:
        """[A + K, D]: the one weight of all query heads, and that of all key heads, repeated."""
        queries, keys = loader.tensor("q_norm"), loader.tensor("k_norm")
        heads = (
            queries.expand(self.config.num_heads, -1),
            keys.expand(self.config.num_kv_heads, -1),
        )
        return torch.cat(heads)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dots1Router:
    """Chooses experts, in float32."""

    config: Dots1Config
    bank: int
    linear: Linear
    """H -> E, float32."""
    correction: Tensor
    """[E] float32: added to the scores for the choice, not for the weights."""

    def route(self, rows: Tensor, context: LayerContext) -> tuple[Tensor, Tensor]:
        """rows [T, H] -> topk_ids [T, k], topk_weights [T, k] float32."""
        logits = self.linear(rows.float())
        scores = row_sigmoid(logits)
        choice = self._within_groups(scores + self.correction)
        ids = choice.topk(self.config.top_k, dim=-1).indices
        weights = scores.gather(1, ids)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * self.config.scaling_factor
        if (recorder := context.attention.recorder) is not None:
            recorder.router(self.bank, logits, ids, weights)
        return ids, weights

    def _within_groups(self, choice: Tensor) -> Tensor:
        """[T, E], -inf outside of the groups with the highest sums of their two best experts."""
        config = self.config
        if config.top_groups == config.num_groups:
            return choice
        grouped = choice.view(len(choice), config.num_groups, -1)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(config.top_groups, dim=-1).indices
        is_out = torch.ones(grouped.shape[:2], dtype=torch.bool, device=choice.device)
        is_out.scatter_(1, best, False)
        return grouped.masked_fill(is_out.unsqueeze(-1), float("-inf")).flatten(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dots1Layer:
    """h + attention(norm1(h)), then + mlp(norm2(.)), and + experts(norm2(.)) with a router."""

    config: ModelConfig
    window: int | None
    """Positions that a token looks at; None: all."""
    norm1: Tensor
    """[H]."""
    qkv: Linear
    """H -> (A + 2K) * D, rows of q, k, v in this order."""
    qk_norm: Tensor
    """[A + K, D]."""
    output: Linear
    """A * D -> H."""
    norm2: Tensor
    """[H]."""
    mlp: GatedMlp
    """MLP of a dense layer, or the shared experts."""
    router: Dots1Router | None
    """None in a dense layer."""
    attend: Attend

    def forward(self, hidden: Tensor, cache: Tensor, context: LayerContext) -> LayerSteps:
        """hidden [T, H] -> [T, H], with one exchange unless the layer is dense."""
        hidden = hidden + self._attention(hidden, cache, context)
        normed = rms_norm(hidden, self.norm2, self.config.rms_norm_eps)
        if self.router is None:
            return hidden + self.mlp(normed)
        ids, weights = self.router.route(normed, context)
        yield Dispatch(self.router.bank, 0, normed, ids, weights)
        shared = self.mlp(normed)
        routed = yield
        return hidden + (routed + shared)

    def _attention(self, hidden: Tensor, cache: Tensor, context: LayerContext) -> Tensor:
        config, eps = self.config, self.config.rms_norm_eps
        rows = self.qkv(rms_norm(hidden, self.norm1, eps)).view(len(hidden), -1, config.head_dim)
        keys_end = config.num_heads + config.num_kv_heads
        heads = rms_norm(rows[:, :keys_end], self.qk_norm, eps)
        heads = rotate(heads, context.cos, context.sin)
        attended = self.attend(
            heads[:, : config.num_heads],
            heads[:, config.num_heads :],
            rows[:, keys_end:],
            cache,
            context.attention if self.window is None else context.windows[self.window],
        )
        return self.output(attended)
