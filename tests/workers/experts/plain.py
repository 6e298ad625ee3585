"""Experts of each kind, and their outputs one pair at a time in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from workers.model.config import Activation, ClampedSwiglu, ExchangeSpec

SWIGLU = ExchangeSpec(index=0, name="mlp", in_width=24, out_width=24, expert_width=16)
GELU, TANH, RELU = (
    replace(SWIGLU, activation=name) for name in ("gelu", "gelu_pytorch_tanh", "relu")
)
CLAMPED = replace(SWIGLU, activation=ClampedSwiglu(1.702, 0.9), has_bias=True)
LINEAR = ExchangeSpec(index=0, name="q", in_width=24, out_width=40, expert_kind="linear")


def weights(exchange: ExchangeSpec, num_slots: int, dtype: torch.dtype) -> list[list[Tensor]]:
    """[slot][matrix]."""
    generator = torch.Generator().manual_seed(1)
    return [
        [
            (torch.randn(shape, generator=generator) / shape[1] ** 0.5).to(dtype)
            for shape in exchange.matrix_shapes
        ]
        for _ in range(num_slots)
    ]


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "gelu_pytorch_tanh": (
        lambda x: x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2
    ),
    "relu": lambda x: x.clamp(min=0),
}


def reference(
    inputs: Tensor,
    pair_input: Tensor,
    pair_slot: Tensor,
    matrices: list[list[Tensor]],
    activation: Activation | ClampedSwiglu = "silu",
) -> Tensor:
    """One pair at a time in double precision; without biases, but for a clamped SwiGLU."""
    outputs = []
    for source, slot in zip(pair_input.tolist(), pair_slot.tolist(), strict=True):
        row = inputs[source].double()
        first, *rest = (m.double() for m in matrices[slot])
        row = first @ row
        if isinstance(activation, ClampedSwiglu):
            second, first_bias, second_bias = rest
            gate, up = (row + first_bias.flatten()).chunk(2)
            gate, up = (
                gate.clamp(max=activation.limit),
                up.clamp(-activation.limit, activation.limit),
            )
            row = second @ (gate / (1 + torch.exp(-activation.alpha * gate)) * (up + 1))
            outputs.append(row + second_bias.flatten())
            continue
        for matrix in rest:
            gate, up = row.chunk(2)
            row = matrix @ (ACTIVATIONS[activation](gate) * up)
        outputs.append(row)
    return torch.stack(outputs)
