"""OLMoE: every layer has attention with whole-vector q/k norms, and a bank of routed experts.

Source: docs of the checkpoint layout and math as in transformers ``models/olmoe``.
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
from workers.model.families.parts import mlp_exchange, part, projection_parts
from workers.model.families.settings import Defaults, Heads, Settings, model_config
from workers.model.layers import Attend, Dispatch, LayerContext, LayerSteps, Linear, rms_norm
from workers.model.rope import rotate

_DEFAULTS = Defaults(
    vocab_size=50304,
    hidden_size=2048,
    num_layers=16,
    max_positions=4096,
    rms_norm_eps=1e-5,
    eos=(50279,),
    pad=1,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class OlmoeConfig:
    """The numbers that OLMoE adds to ``ModelConfig``."""

    num_experts: int
    """E: routed experts of a layer."""
    top_k: int
    expert_width: int
    """I: inner width of an expert."""
    norm_topk_prob: bool
    """Weights of the chosen experts are scaled to sum 1."""
    attention_bias: bool
    """Biases on q, k, v and o."""
    clip_qkv: float | None
    """Limit of the absolute value of q, k and v, after the norms."""


def family(config: Mapping[str, Any]) -> OlmoeFamily:
    """Read ``config.json``. Raises ``CheckpointError`` naming the key we cannot serve."""
    settings = Settings(config)
    settings.architecture("OlmoeForCausalLM")
    own = OlmoeConfig(
        num_experts=settings.integer("num_experts", "num_local_experts", default=64),
        top_k=settings.integer("num_experts_per_tok", default=8),
        expert_width=settings.integer("intermediate_size", default=2048),
        norm_topk_prob=settings.flag("norm_topk_prob", False),
        attention_bias=settings.flag("attention_bias", False),
        clip_qkv=None if config.get("clip_qkv") is None else settings.real("clip_qkv", 1.0),
    )
    if own.top_k > own.num_experts:
        raise CheckpointError(
            f"config.json: num_experts_per_tok {own.top_k} exceeds num_experts {own.num_experts}"
        )
    if any(kind != "full_attention" for kind in settings.value("layer_types") or ()):
        raise CheckpointError("config.json: layer_types of olmoe must all be full_attention")
    shared = model_config(settings, model_type="olmoe", heads=_heads(settings), defaults=_DEFAULTS)
    return OlmoeFamily(shared, own)


def _heads(settings: Settings) -> Heads:
    heads = Heads.read(settings, default_hidden=_DEFAULTS.hidden_size, default_heads=16)
    hidden = settings.integer("hidden_size", default=_DEFAULTS.hidden_size)
    if heads.head_dim * heads.num_heads != hidden:
        raise CheckpointError(
            f"config.json: hidden_size {hidden} must be num_attention_heads {heads.num_heads} "
            f"times an even head_dim (here {heads.head_dim})"
        )
    return heads


class OlmoeFamily(Family):
    def __init__(self, config: ModelConfig, olmoe: OlmoeConfig) -> None:
        exchange = mlp_exchange(config, olmoe.expert_width)
        banks = tuple(
            BankSpec(
                index=layer,
                bank="mlp",
                layer=layer,
                num_experts=olmoe.num_experts,
                top_k=olmoe.top_k,
                exchanges=(exchange,),
                aux_copies=1,
            )
            for layer in range(config.num_layers)
        )
        super().__init__(config, banks)
        self.olmoe = olmoe

    def layer_parts(self, layer: int) -> dict[str, TensorPart]:
        config, prefix = self.config, f"model.layers.{layer}"
        width = config.hidden_size
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        return {
            "norm1": part(f"{prefix}.input_layernorm.weight", width),
            "norm2": part(f"{prefix}.post_attention_layernorm.weight", width),
            "q_norm": part(f"{prefix}.self_attn.q_norm.weight", q),
            "k_norm": part(f"{prefix}.self_attn.k_norm.weight", kv),
            "router": part(f"{prefix}.mlp.gate.weight", self.olmoe.num_experts, width),
        } | projection_parts(f"{prefix}.self_attn", config, self.olmoe.attention_bias)

    def make_layer(self, layer: int, loader: Loader, attend: Attend) -> OlmoeLayer:
        return OlmoeLayer(
            config=self.config,
            clip=self.olmoe.clip_qkv,
            norm1=loader.tensor("norm1"),
            qkv=loader.linear("q", "k", "v"),
            qk_norm=loader.tensor("q_norm", "k_norm"),
            output=loader.linear("o"),
            norm2=loader.tensor("norm2"),
            router=OlmoeRouter(config=self.olmoe, bank=layer, linear=loader.linear("router")),
            attend=attend,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OlmoeRouter:
    """Chooses experts by their probabilities among all."""

    config: OlmoeConfig
    bank: int
    linear: Linear

    def route(self, rows: Tensor, context: LayerContext) -> tuple[Tensor, Tensor]:
        """rows [T, H] -> topk_ids [T, k], topk_weights [T, k] in the model dtype."""
        logits = self.linear(rows)
        probabilities = torch.softmax(logits, -1, dtype=torch.float32)
        weights, ids = probabilities.topk(self.config.top_k, dim=-1)
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.to(rows.dtype)
        if (recorder := context.attention.recorder) is not None:
            recorder.router(self.bank, logits, ids, weights)
        return ids, weights


@dataclass(frozen=True, kw_only=True, slots=True)
class OlmoeLayer:
    """h + attention(norm1(h)), then + experts(norm2(.))."""

    config: ModelConfig
    clip: float | None
    """Limit of the absolute value of q, k and v, after the norms."""
    norm1: Tensor
    """[H]."""
    qkv: Linear
    """H -> (A + 2K) * D, rows of q, k, v in this order."""
    qk_norm: Tensor
    """[(A + K) * D]."""
    output: Linear
    """A * D -> H."""
    norm2: Tensor
    """[H]."""
    router: OlmoeRouter
    attend: Attend

    def forward(self, hidden: Tensor, cache: Tensor, context: LayerContext) -> LayerSteps:
        """hidden [T, H] -> [T, H], with one exchange."""
        hidden = hidden + self._attention(hidden, cache, context)
        normed = rms_norm(hidden, self.norm2, self.config.rms_norm_eps)
        ids, weights = self.router.route(normed, context)
        yield Dispatch(self.router.bank, 0, normed, ids, weights)
        routed = yield
        return hidden + routed

    def _attention(self, hidden: Tensor, cache: Tensor, context: LayerContext) -> Tensor:
        config, eps = self.config, self.config.rms_norm_eps
        rows = self.qkv(rms_norm(hidden, self.norm1, eps))
        values = rows[:, len(self.qk_norm) :]
        normed = self._normed(rows[:, : len(self.qk_norm)])
        if self.clip is not None:
            normed.clamp_(-self.clip, self.clip)
            values = values.clamp(-self.clip, self.clip)
        from_heads = normed.view(len(rows), -1, config.head_dim)
        heads = rotate(from_heads, context.cos, context.sin)
        attended = self.attend(
            heads[:, : config.num_heads],
            heads[:, config.num_heads :],
            values.view(len(rows), -1, config.head_dim),
            cache,
            context.attention,
        )
        return self.output(attended)

    def _normed(self, rows: Tensor) -> Tensor:
        """Queries and keys, each normalised over all its heads; at once where they are as wide."""
        config, weight = self.config, self.qk_norm
        if config.num_heads == config.num_kv_heads:
            both, weights = rows.reshape(len(rows), 2, -1), weight.view(2, -1)
            return rms_norm(both, weights, config.rms_norm_eps).flatten(1)
        widths = [n * config.head_dim for n in (config.num_heads, config.num_kv_heads)]
        parts = zip(torch.split(rows, widths, 1), torch.split(weight, widths), strict=True)
        return torch.cat([rms_norm(part, w, config.rms_norm_eps) for part, w in parts], 1)
