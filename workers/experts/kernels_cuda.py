"""Expert kernels on CUDA (``workers.cuda.experts``). They never wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.experts.stacked import StackedWeights
from workers.model.config import ClampedSwiglu


class CudaExperts(StackedWeights):
    """``ExpertKernel`` with Triton; tests on CPUs run it in Triton's interpreter."""

    def compute(self, inputs: Tensor, pair_input: Tensor, pair_slot: Tensor) -> Tensor:
        return self._compute(inputs, pair_slot.unsqueeze(1), pair_input, 1)

    def compute_rows(
        self,
        inputs: Tensor,
        slots: Tensor,
        weights: Tensor,
        float32_weights: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return the weighted sum of the expert outputs of each row; see
        ``ExpertBank.compute_rows``. The sum of a row without a slot is 0."""
        from workers.cuda.row_sums import sum_rows

        sources, per_slot = None, self._exchange.per_slot_input
        if per_slot and inputs.shape[0] != slots.numel():
            sources = (slots.flatten() >= 0).cumsum(0) - 1
        outputs = self._compute(inputs, slots, sources, 1 if per_slot else slots.shape[1])
        return sum_rows(outputs, slots, weights, not float32_weights, dtype)

    def _compute(
        self, inputs: Tensor, slots: Tensor, sources: Tensor | None, per_row: int
    ) -> Tensor:
        """Return outputs [T * k, out] for slots [T, k], undefined where a slot is -1. The input row
        of pair p is ``sources[p]``, or p // ``per_row``."""
        from workers.cuda.experts import GateActivation, Matrices, gate_up, make_pairs, multiply

        rows, parts, own = inputs.contiguous(), self._parts, self._exchange.activation
        products = self._exchange.product_shapes
        weights = [
            Matrices.of(own_parts, self._exchange.form, width)
            for own_parts, (_, width) in zip(parts, products, strict=False)
        ]
        biases = [own_parts[0] for own_parts in parts[len(products) :]]
        pairs = make_pairs(slots, len(parts[0][0]), sources, per_row, rows.dtype)
        if len(weights) > 1:
            activation = (
                GateActivation("clamped_swiglu", own.alpha, own.limit)
                if isinstance(own, ClampedSwiglu)
                else GateActivation(own)
            )
            rows = gate_up(rows, weights[0], biases[0] if biases else None, pairs, activation)
            pairs = pairs.of_outputs()
        return multiply(rows, weights[-1], biases[-1] if biases else None, pairs)
