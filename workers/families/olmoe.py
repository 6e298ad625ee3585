"""OLMoE: every layer has attention with whole-vector q/k norms, and a bank of routed experts.

Source: docs of the checkpoint layout and math as in transformers ``models/olmoe``.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cluster.errors import CheckpointError
from workers.attention import attend
from workers.families.base import (
    BankSpec,
    ExchangeSpec,
    ExpertMatrix,
    ModelConfig,
    TensorPart,
    WeightSource,
)
from workers.layers import AttentionModel, Exchange, LayerContext, LayerSteps, Linear, rms_norm
from workers.rope import Rope, parse_rope, rotate


@dataclass(frozen=True, kw_only=True, slots=True)
class OlmoeConfig:
    """The numbers that OLMoE adds to ``ModelConfig``."""

    num_experts: int
    """E: routed experts of a layer."""
    top_k: int
    """Experts chosen for each token."""
    expert_width: int
    """I: inner width of an expert."""
    norm_topk_prob: bool
    """Weights of the chosen experts are scaled to sum 1."""
    attention_bias: bool
    """Biases on q, k, v and o."""
    clip_qkv: float | None
    """Limit of the absolute value of q, k and v, after the norms."""


_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "sliding_window": (),
    "quantization_config": (),
    "partial_rotary_factor": (1, 1.0),
    "num_shared_experts": (0,),
    "n_shared_experts": (0,),
    "routed_scaling_factor": (1, 1.0),
    "first_k_dense_replace": (0,),
    "final_logit_softcapping": (),
    "attn_logit_softcapping": (),
    "logit_scale": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
}
"""Keys that would change results, with the values (beside null) that do not."""


def family(config: Mapping[str, Any]) -> OlmoeFamily:
    """Read ``config.json``. Raises ``CheckpointError`` naming the key we cannot serve."""
    for key, allowed in _NEUTRAL.items():
        value = config.get(key)
        if value is not None and value not in allowed:
            known = " or ".join(repr(v) for v in allowed) or "null"
            raise CheckpointError(
                f"config.json: {key} {value!r} is not supported for olmoe: must be {known}"
            )
    if any(kind != "full_attention" for kind in config.get("layer_types") or ()):
        raise CheckpointError("config.json: layer_types of olmoe must all be full_attention")
    numbers = _Numbers(config)
    hidden, heads = numbers.integer("hidden_size", 2048), numbers.integer("num_attention_heads", 16)
    max_positions = numbers.integer("max_position_embeddings", 4096)
    head_dim = numbers.integer("head_dim", hidden // heads)
    if hidden % heads or head_dim * heads != hidden or head_dim % 2:
        raise CheckpointError(
            f"config.json: hidden_size {hidden} must be num_attention_heads {heads} "
            f"times an even head_dim (here {head_dim})"
        )
    shared = ModelConfig(
        model_type="olmoe",
        vocab_size=numbers.integer("vocab_size", 50304),
        hidden_size=hidden,
        num_layers=numbers.integer("num_hidden_layers", 16),
        num_heads=heads,
        num_kv_heads=numbers.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rms_norm_eps=numbers.real("rms_norm_eps", 1e-5),
        tie_word_embeddings=bool(config.get("tie_word_embeddings") or False),
        eos_token_ids=_eos_ids(config),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        rope=parse_rope(config, head_dim, max_positions),
    )
    own = OlmoeConfig(
        num_experts=numbers.integer("num_experts", 64),
        top_k=numbers.integer("num_experts_per_tok", 8),
        expert_width=numbers.integer("intermediate_size", 2048),
        norm_topk_prob=bool(config.get("norm_topk_prob") or False),
        attention_bias=bool(config.get("attention_bias") or False),
        clip_qkv=None if config.get("clip_qkv") is None else numbers.real("clip_qkv", 0.0),
    )
    if shared.num_heads % shared.num_kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {heads} must be a multiple of "
            f"num_key_value_heads {shared.num_kv_heads}"
        )
    if own.top_k > own.num_experts:
        raise CheckpointError(
            f"config.json: num_experts_per_tok {own.top_k} exceeds num_experts {own.num_experts}"
        )
    return OlmoeFamily(shared, own)


class _Numbers:
    """Reads numbers; null counts as absent, as in transformers."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def integer(self, key: str, default: int) -> int:
        value = self._config.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"config.json: {key} {value!r} must be a positive integer")
        return value

    def real(self, key: str, default: float) -> float:
        value = self._config.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise CheckpointError(f"config.json: {key} {value!r} must be a positive number")
        return float(value)


def _eos_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    if value is None:
        return ()
    return tuple(int(v) for v in value) if isinstance(value, list) else (int(value),)


class OlmoeFamily:
    """``Family`` of an OLMoE checkpoint."""

    def __init__(self, config: ModelConfig, olmoe: OlmoeConfig) -> None:
        self.config = config
        self.olmoe = olmoe
        exchange = ExchangeSpec(
            index=0,
            name="mlp",
            in_width=config.hidden_size,
            out_width=config.hidden_size,
            expert_width=olmoe.expert_width,
        )
        self.banks = tuple(
            BankSpec(
                index=layer,
                bank="mlp",
                layer=layer,
                num_experts=olmoe.num_experts,
                top_k=olmoe.top_k,
                exchanges=(exchange,),
            )
            for layer in range(config.num_layers)
        )

    def attention_tensors(self) -> Iterator[TensorPart]:
        """All tensors but the routed experts."""
        width = self.config.hidden_size
        yield self._vocab("model.embed_tokens.weight")
        yield TensorPart(name="model.norm.weight", shape=(width,))
        if not self.config.tie_word_embeddings:
            yield self._vocab("lm_head.weight")
        for layer in range(self.config.num_layers):
            yield from self._layer_parts(layer).values()

    def expert_matrices(
        self, bank: BankSpec, exchange: int, expert: int, names: Container[str]
    ) -> tuple[ExpertMatrix, ...]:
        """gate over up [2I, H], then down [H, I]; per expert on disk, or fused over all experts."""
        width, inner = self.config.hidden_size, self.olmoe.expert_width
        prefix = f"model.layers.{bank.layer}.mlp.experts"
        if f"{prefix}.gate_up_proj" in names:
            total = self.olmoe.num_experts
            up: tuple[TensorPart, ...] = (
                _part(f"{prefix}.gate_up_proj", total, 2 * inner, width, index=expert),
            )
            down = _part(f"{prefix}.down_proj", total, width, inner, index=expert)
        else:
            prefix = f"{prefix}.{expert}"
            up = (
                _part(f"{prefix}.gate_proj.weight", inner, width),
                _part(f"{prefix}.up_proj.weight", inner, width),
            )
            down = _part(f"{prefix}.down_proj.weight", width, inner)
        return (
            ExpertMatrix(shape=(2 * inner, width), parts=up),
            ExpertMatrix(shape=(width, inner), parts=(down,)),
        )

    def attention_model(
        self,
        weights: WeightSource,
        dtype: torch.dtype,
        device: torch.device,
        max_positions: int | None = None,
    ) -> AttentionModel:
        """Load everything but the routed experts, one tensor at a time."""
        embedding = weights.read(self._vocab("model.embed_tokens.weight"), dtype).to(device)
        layers = [self._layer(i, weights, dtype, device) for i in range(self.config.num_layers)]
        norm = TensorPart(name="model.norm.weight", shape=(self.config.hidden_size,))
        tied = self.config.tie_word_embeddings
        head = embedding if tied else weights.read(self._vocab("lm_head.weight"), dtype).to(device)
        limit = max_positions or self.config.max_position_embeddings
        return AttentionModel(
            embedding=embedding,
            layers=layers,
            norm=weights.read(norm, dtype).to(device),
            norm_eps=self.config.rms_norm_eps,
            lm_head=Linear(head, may_pack=not tied),
            rope=Rope(self.config.rope, limit, dtype, device),
        )

    def _vocab(self, name: str) -> TensorPart:
        return _part(name, self.config.vocab_size, self.config.hidden_size)

    def _layer_parts(self, layer: int) -> dict[str, TensorPart]:
        """Tensors of a layer, by short name."""
        config, prefix = self.config, f"model.layers.{layer}"
        width = config.hidden_size
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        parts = {
            "norm1": _part(f"{prefix}.input_layernorm.weight", width),
            "norm2": _part(f"{prefix}.post_attention_layernorm.weight", width),
            "q_norm": _part(f"{prefix}.self_attn.q_norm.weight", q),
            "k_norm": _part(f"{prefix}.self_attn.k_norm.weight", kv),
            "gate": _part(f"{prefix}.mlp.gate.weight", self.olmoe.num_experts, width),
        }
        for name, rows, columns in (
            ("q", q, width),
            ("k", kv, width),
            ("v", kv, width),
            ("o", width, q),
        ):
            parts[name] = _part(f"{prefix}.self_attn.{name}_proj.weight", rows, columns)
            if self.olmoe.attention_bias:
                parts[f"{name}_bias"] = _part(f"{prefix}.self_attn.{name}_proj.bias", rows)
        return parts

    def _layer(
        self, layer: int, weights: WeightSource, dtype: torch.dtype, device: torch.device
    ) -> OlmoeLayer:
        parts = self._layer_parts(layer)

        def read(*names: str) -> Tensor:
            return weights.read_stacked([parts[n] for n in names], dtype).to(device)

        bias = self.olmoe.attention_bias
        return OlmoeLayer(
            config=self.config,
            olmoe=self.olmoe,
            bank=layer,
            norm1=read("norm1"),
            qkv=Linear(read("q", "k", "v"), read("q_bias", "k_bias", "v_bias") if bias else None),
            q_norm=read("q_norm"),
            k_norm=read("k_norm"),
            output=Linear(read("o"), read("o_bias") if bias else None),
            norm2=read("norm2"),
            gate=Linear(read("gate")),
        )


def _part(name: str, *shape: int, index: int | None = None) -> TensorPart:
    return TensorPart(name=name, shape=shape, index=index)


@dataclass(frozen=True, kw_only=True, slots=True)
class OlmoeLayer:
    """h + attention(norm1(h)), then + experts(norm2(.))."""

    config: ModelConfig
    """Shared numbers."""
    olmoe: OlmoeConfig
    """OLMoE's numbers."""
    bank: int
    """Bank of this layer's experts."""
    norm1: Tensor
    """[H]."""
    qkv: Linear
    """H -> (A + 2K) * D, rows of q, k, v in this order."""
    q_norm: Tensor
    """[A * D]."""
    k_norm: Tensor
    """[K * D]."""
    output: Linear
    """A * D -> H."""
    norm2: Tensor
    """[H]."""
    gate: Linear
    """H -> E."""

    def forward(self, hidden: Tensor, cache: Tensor, context: LayerContext) -> LayerSteps:
        """hidden [T, H] -> [T, H], with one exchange."""
        hidden = hidden + self._attention(hidden, cache, context)
        normed = rms_norm(hidden, self.norm2, self.config.rms_norm_eps)
        ids, weights = self._route(normed, context)
        routed = yield Exchange(self.bank, 0, normed, ids, weights)
        return hidden + routed

    def _attention(self, hidden: Tensor, cache: Tensor, context: LayerContext) -> Tensor:
        config, eps = self.config, self.config.rms_norm_eps
        q_width, kv_width = len(self.q_norm), len(self.k_norm)
        rows = self.qkv(rms_norm(hidden, self.norm1, eps))
        values = rows[:, q_width + kv_width :]
        normed = rows.new_empty(len(rows), q_width + kv_width)
        queries, keys = rows[:, :q_width], rows[:, q_width : q_width + kv_width]
        for source, weight, first in ((queries, self.q_norm, 0), (keys, self.k_norm, q_width)):
            scaled = torch.nn.functional.rms_norm(source, (len(weight),), None, eps)
            torch.mul(scaled, weight, out=normed[:, first : first + len(weight)])
        if self.olmoe.clip_qkv is not None:
            limit = self.olmoe.clip_qkv
            normed.clamp_(-limit, limit)
            values = values.clamp(-limit, limit)
        from_heads = normed.view(len(rows), -1, config.head_dim)
        heads = rotate(from_heads, context.cos, context.sin)
        attended = attend(
            heads[:, : config.num_heads],
            heads[:, config.num_heads :],
            values.view(len(rows), -1, config.head_dim),
            cache,
            context.attention,
        )
        return self.output(attended)

    def _route(self, rows: Tensor, context: LayerContext) -> tuple[Tensor, Tensor]:
        """topk_ids and topk_weights [T, k]: probabilities over all experts, then the best k."""
        logits = self.gate(rows)
        probabilities = torch.softmax(logits, -1, dtype=torch.float32)
        weights, ids = probabilities.topk(self.olmoe.top_k, dim=-1)
        if self.olmoe.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.to(rows.dtype)
        if context.recorder is not None:
            context.recorder.router(self.bank, logits, ids, weights)
        return ids, weights
