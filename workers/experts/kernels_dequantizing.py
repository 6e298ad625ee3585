"""Torch kernel for quantized experts: the reference, and the kernel of CPUs without compiled
kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from workers.model.config import ExchangeSpec
from workers.model.layers import gated_activation
from workers.quantization.matrix import QuantizedMatrix, Weight


class DequantizingExperts:
    """Expert kernel that dequantizes the matrices of a slot to float32 for each product.

    Rows are multiplied one by one, so that no row's bits depend on other rows. The input of the
    second product is rounded to the model dtype.
    """

    def __init__(self, exchange: ExchangeSpec, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._num_products = len(exchange.product_shapes)
        self._width = exchange.out_width
        self._activate = gated_activation(exchange.activation)
        self._weights: list[list[Weight | None]] = [[] for _ in exchange.matrix_shapes]

    def resize(self, num_slots: int) -> None:
        """Change the number of slots; remaining slots keep their contents, and empty slots take no
        memory."""
        self._weights = [
            [*slots[:num_slots], *([None] * (num_slots - len(slots)))] for slots in self._weights
        ]

    def store(self, slot: int, matrix: int, weight: Weight) -> None:
        if isinstance(weight, Tensor):
            self._weights[matrix][slot] = weight.to(self._dtype, copy=True)
            return
        copy = QuantizedMatrix.empty(weight.format, weight.shape)
        for own, part in zip(copy.parts, weight.parts, strict=True):
            own.copy_(part)
        self._weights[matrix][slot] = copy

    def read(self, slot: int, matrix: int) -> Weight:
        """Return a stored matrix itself, not a copy, because stored weights are never modified.
        Raises ``IndexError`` if the slot is empty."""
        weight = self._weights[matrix][slot]
        if weight is None:
            raise IndexError(f"slot {slot} is empty")
        return weight

    def clear(self, slot: int) -> None:
        for slots in self._weights:
            slots[slot] = None

    def compute(self, inputs: Tensor, pair_input: Tensor, pair_slot: Tensor) -> Tensor:
        outputs = inputs.new_empty(len(pair_slot), self._width)
        for slot in sorted(set(pair_slot.tolist())):
            places = (pair_slot == slot).nonzero().squeeze(1)
            rows = inputs[pair_input[places]]
            for product in range(self._num_products):
                rows = self._multiply(slot, product, self._activate(rows) if product else rows)
            outputs[places] = rows
        return outputs

    def _multiply(self, slot: int, product: int, rows: Tensor) -> Tensor:
        weight = self.read(slot, product)
        assert isinstance(weight, QuantizedMatrix)
        matrix, bias = weight.dequantized(), None
        if len(self._weights) > self._num_products:
            found = self.read(slot, self._num_products + product)
            assert isinstance(found, Tensor)
            bias = found.flatten().float()
        each = [functional.linear(row, matrix, bias) for row in rows.float()]
        return torch.stack(each).to(self._dtype)
