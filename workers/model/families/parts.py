"""Shared code of families: names and shapes of tensors, attention, and the exchange of an MLP
bank."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from workers.model.attention_sublayer import AttentionShape
from workers.model.config import (
    BankSpec,
    ClampedSwiglu,
    ExchangeSpec,
    ExpertMatrix,
    ModelConfig,
    TensorPart,
)
from workers.model.rope import rotation_order


def part(name: str, *shape: int, index: int | None = None) -> TensorPart:
    """Describe a checkpoint tensor, or entry ``index`` of its first dimension (one expert)."""
    return TensorPart(name=name, shape=shape, index=index)


def mlp_exchange(
    config: ModelConfig,
    expert_width: int,
    activation: ClampedSwiglu | None = None,
    has_bias: bool = False,
) -> ExchangeSpec:
    """Return the only exchange of a bank of gated MLPs: hidden states in, hidden states out.

    ``activation`` None: the activation of ``config``.
    """
    return ExchangeSpec(
        index=0,
        name="mlp",
        in_width=config.hidden_size,
        out_width=config.hidden_size,
        expert_width=expert_width,
        activation=activation or config.activation,
        has_bias=has_bias,
    )


def norm_parts(prefix: str, config: ModelConfig) -> dict[str, TensorPart]:
    """Return a layer's norm tensors: ``norm1`` (before attention), ``norm2`` (before the MLP)."""
    names = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    return {k: part(f"{prefix}.{name}.weight", config.hidden_size) for k, name in names.items()}


def attention_shape(
    config: ModelConfig,
    *,
    eps: float | None = None,
    clip: float | None = None,
    window: int | None = None,
) -> AttentionShape:
    """Return the dimensions and parameters of a layer's attention; ``eps`` None: the model's."""
    return AttentionShape(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        eps=config.rms_norm_eps if eps is None else eps,
        clip=clip,
        window=window,
    )


def projection_parts(
    prefix: str,
    config: ModelConfig,
    has_bias: bool,
    has_output_bias: bool | None = None,
    *,
    has_gates: bool = False,
) -> dict[str, TensorPart]:
    """Return a layer's attention projections ``q``, ``k``, ``v``, ``o``, and their biases if any.

    ``has_output_bias``: whether ``o`` has a bias; None: as q, k and v. ``has_gates``: whether ``q``
    also has the rows of gates, one per query row.
    """
    width = config.hidden_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    parts = {}
    for name, rows, columns in (
        ("q", 2 * q if has_gates else q, width),
        ("k", kv, width),
        ("v", kv, width),
        ("o", width, q),
    ):
        parts[name] = part(f"{prefix}.{name}_proj.weight", rows, columns)
        if has_output_bias if name == "o" and has_output_bias is not None else has_bias:
            parts[f"{name}_bias"] = part(f"{prefix}.{name}_proj.bias", rows)
    return parts


def head_norm_parts(prefix: str, config: ModelConfig) -> dict[str, TensorPart]:
    """Return a layer's norm tensors of queries and keys, [D] each, shared by all heads."""
    names = ("q_norm", "k_norm")
    return {name: part(f"{prefix}.{name}.weight", config.head_dim) for name in names}


def rotation_rows(config: ModelConfig) -> Tensor | None:
    """Return the order of q, k, v rows that gives query and key heads ``rotation_order``.

    Shape [(A + 2K) * D], int64. None if the checkpoint already has this order.
    """
    rope, dim = config.rope, config.head_dim
    if rope.rotary_dim == dim and not rope.has_neighbours:
        return None
    num_rotated = config.num_heads + config.num_kv_heads
    heads = torch.arange(num_rotated).unsqueeze(1) * dim + rotation_order(rope)
    values = num_rotated * dim + torch.arange(config.num_kv_heads * dim)
    return torch.cat((heads.flatten(), values))


def head_norms(config: ModelConfig, queries: Tensor, keys: Tensor) -> Tensor:
    """Return norm weights [A + K, D]: ``queries`` [D] A times, then ``keys`` [D] K times."""
    heads = queries.expand(config.num_heads, -1), keys.expand(config.num_kv_heads, -1)
    return torch.cat(heads)


def mlp_parts(prefix: str, width: int, inner: int) -> dict[str, TensorPart]:
    """Return a gated MLP's tensors ``gate``, ``up`` [inner, width] and ``down`` [width, inner]."""
    return {
        "gate": part(f"{prefix}.gate_proj.weight", inner, width),
        "up": part(f"{prefix}.up_proj.weight", inner, width),
        "down": part(f"{prefix}.down_proj.weight", width, inner),
    }


def gated_expert(
    prefix: str, bank: BankSpec, expert: int, names: Container[str]
) -> tuple[ExpertMatrix, ...]:
    """Return an expert's matrices: gate over up [2 * inner, width], and down [width, inner]."""
    (exchange,) = bank.exchanges
    width, inner = exchange.in_width, exchange.expert_width
    up: tuple[TensorPart, ...]
    if f"{prefix}.gate_up_proj" in names:
        shape = (bank.num_experts, 2 * inner, width)
        up = (part(f"{prefix}.gate_up_proj", *shape, index=expert),)
        down = part(f"{prefix}.down_proj", bank.num_experts, width, inner, index=expert)
    else:
        own = mlp_parts(f"{prefix}.{expert}", width, inner)
        up, down = (own["gate"], own["up"]), own["down"]
    return (
        ExpertMatrix(shape=(2 * inner, width), parts=up),
        ExpertMatrix(shape=(width, inner), parts=(down,)),
    )


def block_sparse_expert(bank: BankSpec, expert: int) -> tuple[ExpertMatrix, ...]:
    """Return an expert's matrices with Mixtral's names: gate (w1) over up (w3), down (w2)."""
    (exchange,) = bank.exchanges
    width, inner = exchange.in_width, exchange.expert_width
    prefix = f"model.layers.{bank.layer}.block_sparse_moe.experts.{expert}"
    gate, up = (part(f"{prefix}.{name}.weight", inner, width) for name in ("w1", "w3"))
    down = part(f"{prefix}.w2.weight", width, inner)
    return (
        ExpertMatrix(shape=(2 * inner, width), parts=(gate, up)),
        ExpertMatrix(shape=(width, inner), parts=(down,)),
    )
