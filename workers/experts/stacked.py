"""Weights of an expert kernel as one tensor per matrix: [slots, out, in]."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from workers.model.config import ExchangeSpec
from workers.model.layers import GatedActivation, gated_activation
from workers.model.side_stream import SideStream
from workers.quantization.matrix import QuantizedMatrix, Weight, empty_weight, parts_of


class StackedWeights:
    """Base class of expert kernels that stores each matrix of all slots as one tensor
    [slots, out, in]."""

    def __init__(
        self,
        exchange: ExchangeSpec,
        dtype: torch.dtype,
        device: torch.device,
        side: SideStream | None = None,
    ) -> None:
        """Make storage without slots. ``side``: CUDA stream on which the threads that load experts
        store and read weights; by default a new one."""
        self._side = side or SideStream(device)
        shapes = exchange.matrix_shapes
        self._exchange = exchange
        self._num_products = len(exchange.product_shapes)
        self._activate = gated_activation(exchange.activation)
        with torch.device("meta"):
            likes = [empty_weight(exchange.form_of(i), s, dtype) for i, s in enumerate(shapes)]
        self._parts = [
            [torch.zeros((0, *p.shape), dtype=p.dtype, device=device) for p in parts_of(like)]
            for like in likes
        ]
        """Tensors of each matrix: the matrix itself, or its quantized values, scales and zero
        points; each is [slots, ..]."""

    @property
    def _weights(self) -> list[Tensor]:
        """For each matrix, the tensor [slots, ..] of its elements or quantized values."""
        return [parts[0] for parts in self._parts]

    def resize(self, num_slots: int) -> None:
        """Change the number of slots; remaining slots keep their contents. New slots are zeros,
        which on a CPU take no memory until written."""
        self._parts = [[_resized(old, num_slots) for old in parts] for parts in self._parts]
        self._side.follow()

    def store(self, slot: int, matrix: int, weight: Weight) -> None:
        with self._side.work():
            for own, part in zip(self._parts[matrix], parts_of(weight), strict=True):
                own[slot].copy_(self._side.to_device(part))

    def read(self, slot: int, matrix: int) -> Weight:
        with self._side.work():
            parts = [self._side.to_host(own[slot].clone()) for own in self._parts[matrix]]
        form, shape = self._exchange.form_of(matrix), self._exchange.matrix_shapes[matrix]
        return parts[0] if form is None else QuantizedMatrix.of_parts(form, shape, parts)

    def clear(self, slot: int) -> None:
        with self._side.work():
            for parts in self._parts:
                for own in parts:
                    own[slot].zero_()


def batched_products(
    blocks: Tensor, matrices: Iterable[Tensor], num_products: int, activate: GatedActivation
) -> Tensor:
    """Run blocks [B, rows, in] through experts: [B, rows, out]. ``matrices``: for each matrix of
    ``ExchangeSpec.matrix_shapes``, a tensor [B, out, in] with the matrix of each block."""
    known = list(matrices)
    weights, biases = known[:num_products], known[num_products:]
    for i, weight in enumerate(weights):
        blocks = torch.bmm(activate(blocks) if i else blocks, weight.transpose(1, 2))
        if biases:
            blocks += biases[i].transpose(1, 2)
    return blocks


def _resized(weights: Tensor, num_slots: int) -> Tensor:
    """Return weights [slots, ..] as [num_slots, ..]: the existing slots, then zeros."""
    new = weights.new_zeros((num_slots, *weights.shape[1:]))
    kept = min(len(weights), num_slots)
    new[:kept] = weights[:kept]
    return new
