"""Expert kernels on CUDA: our own for few rows, a grouped product for many.

Nothing here waits for the device. Tests run both on CPUs, ours in Triton's interpreter.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from workers.experts.stacked import StackedWeights
from workers.model.config import ExchangeSpec
from workers.model.side_stream import SideStream

GROUPED_MIN_PAIRS = 4096
"""Pairs of a call from which on ``functional.grouped_mm`` computes: 64 for each of 64 experts. With
fewer, the reading of weights is the cost, which the tiles of ours are made for; with some 200 for
each expert a GPU like the H100 is limited by products. An estimate, not measured yet."""
_ALIGNMENT_BYTES = 16
"""``functional.grouped_mm`` needs rows of operands to start at multiples of this."""


class CudaExperts(StackedWeights):
    """``functional.grouped_mm`` over all slots for many pairs in bfloat16, else our own kernels."""

    def __init__(
        self,
        exchange: ExchangeSpec,
        dtype: torch.dtype,
        device: torch.device,
        side: SideStream | None = None,
        grouped_min_pairs: int = GROUPED_MIN_PAIRS,
    ) -> None:
        super().__init__(exchange, dtype, device, side)
        widths = {n for shape in exchange.matrix_shapes for n in shape}
        self._activation = exchange.activation
        self._per_slot_input = exchange.per_slot_input
        self._grouped_min_pairs = grouped_min_pairs
        self._has_grouped = (
            dtype == torch.bfloat16
            and (device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0))
            and all(n * dtype.itemsize % _ALIGNMENT_BYTES == 0 for n in widths)
        )

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
        """See ``ExpertBank.compute_rows``; a row may also have no slot at all."""
        from workers.cuda.experts import sum_rows

        sources = None
        if self._per_slot_input and inputs.shape[0] != slots.numel():
            sources = (slots.flatten() >= 0).cumsum(0) - 1
        per_row = 1 if self._per_slot_input else slots.shape[1]
        outputs = self._compute(inputs, slots, sources, per_row)
        return sum_rows(outputs, slots, weights, not float32_weights, dtype)

    def _compute(
        self, inputs: Tensor, slots: Tensor, sources: Tensor | None, per_row: int
    ) -> Tensor:
        """Outputs [T * k, out] for slots [T, k], anything where a slot is -1. Pair p has the input
        row ``sources[p]``, or p // ``per_row``."""
        if self._has_grouped and slots.numel() >= self._grouped_min_pairs:
            if sources is None:
                sources = torch.arange(slots.numel(), device=slots.device) // per_row
            return self._grouped(inputs, slots.flatten(), sources)
        from workers.cuda.experts import gate_up, make_pairs, multiply

        rows, matrices = inputs.contiguous(), self._weights
        pairs = make_pairs(slots, len(matrices[0]), sources, per_row)
        if len(matrices) > 1:
            rows = gate_up(rows, matrices[0], pairs, self._activation)
            pairs = pairs.of_outputs()
        return multiply(rows, matrices[-1], pairs)

    def _grouped(self, inputs: Tensor, slots: Tensor, sources: Tensor) -> Tensor:
        weights = self._weights
        num_slots = len(weights[0])
        places = torch.where(slots < 0, num_slots, slots)
        places, order = places.sort(stable=True)
        # Not ``bincount``, which waits for the device.
        known = torch.arange(num_slots, dtype=places.dtype, device=places.device)
        ends = torch.searchsorted(places, known, right=True, out_int32=True)
        rows = inputs[sources[order]]
        for matrix, weight in enumerate(weights):
            rows = self._activate(rows) if matrix else rows
            rows = functional.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
        output = torch.empty_like(rows)
        output[order] = rows
        return output
