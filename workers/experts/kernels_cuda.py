"""Expert kernel on CUDA: a grouped product over the slots with rows. Tests run it on CPUs too."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from workers.experts.stacked import StackedWeights
from workers.model.config import ExchangeSpec
from workers.model.side_stream import SideStream

_ALIGNMENT_BYTES = 16
"""``functional.grouped_mm`` needs rows of operands to start at multiples of this."""


class GroupedExperts(StackedWeights):
    """``functional.grouped_mm`` over all slots in bfloat16, else one product per used slot."""

    def __init__(
        self,
        exchange: ExchangeSpec,
        dtype: torch.dtype,
        device: torch.device,
        side: SideStream | None = None,
    ) -> None:
        super().__init__(exchange, dtype, device, side)
        widths = {n for shape in exchange.matrix_shapes for n in shape}
        self._has_grouped = (
            dtype == torch.bfloat16
            and (device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0))
            and all(n * dtype.itemsize % _ALIGNMENT_BYTES == 0 for n in widths)
        )

    def compute(self, inputs: Tensor, pair_input: Tensor, pair_slot: Tensor) -> Tensor:
        weights = self._weights
        order = pair_slot.argsort(stable=True)
        counts = torch.bincount(pair_slot, minlength=len(weights[0]))
        rows = inputs[pair_input[order]]
        multiply = self._grouped if self._has_grouped else self._loop
        for matrix, weight in enumerate(weights):
            if matrix == 1:
                rows = self._activate(rows)
            rows = multiply(rows, weight, counts)
        output = torch.empty_like(rows)
        output[order] = rows
        return output

    @staticmethod
    def _grouped(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0).to(torch.int32)
        return functional.grouped_mm(rows, weight.transpose(1, 2), offs=ends)

    @staticmethod
    def _loop(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        sizes = counts.tolist()  # device-to-host sync
        pieces = torch.split(rows, sizes)
        outputs = [
            functional.linear(x, w) for x, w, n in zip(pieces, weight, sizes, strict=True) if n
        ]
        return torch.cat(outputs)
