"""Expert kernel on CUDA: a grouped product over the slots with rows. Tests run it on CPUs too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from workers.experts.stacked import StackedWeights
from workers.layers import Gate, swiglu

_ALIGNMENT_BYTES = 16
"""``torch._grouped_mm`` wants rows of operands to start at multiples of this."""


class GroupedExperts(StackedWeights):
    """``torch._grouped_mm`` over all slots in bfloat16, else one product per used slot."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        device: torch.device,
        gate: Gate = swiglu,
    ) -> None:
        """shapes: [out, in] of each matrix of an expert: one, or gate-over-up and down."""
        super().__init__(shapes, dtype, device)
        self._gate = gate
        widths = {n for shape in shapes for n in shape}
        self._has_grouped = (
            dtype == torch.bfloat16
            and hasattr(torch, "_grouped_mm")
            and (device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0))
            and all(n * dtype.itemsize % _ALIGNMENT_BYTES == 0 for n in widths)
        )

    def compute(self, inputs: Tensor, pair_input: Tensor, pair_slot: Tensor) -> Tensor:
        """Outputs [P, out] of pairs; see ``ExpertBank.compute``."""
        weights = self._weights
        order = pair_slot.argsort(stable=True)
        counts = torch.bincount(pair_slot, minlength=len(weights[0]))
        rows = inputs[pair_input[order]]
        multiply = self._grouped if self._has_grouped else self._loop
        for matrix, weight in enumerate(weights):
            if matrix == 1:
                rows = self._gate(rows)
            rows = multiply(rows, weight, counts)
        output = torch.empty_like(rows)
        output[order] = rows
        return output

    @staticmethod
    def _grouped(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0).to(torch.int32)
        result: Tensor = torch._grouped_mm(rows, weight.transpose(1, 2), offs=ends)
        return result

    @staticmethod
    def _loop(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        sizes = counts.tolist()  # device-to-host sync
        pieces = torch.split(rows, sizes)
        outputs = [
            functional.linear(x, w) for x, w, n in zip(pieces, weight, sizes, strict=True) if n
        ]
        return torch.cat(outputs)
