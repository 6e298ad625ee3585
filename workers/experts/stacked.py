"""Weights of an expert kernel as one tensor a matrix: [slots, out, in]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class StackedWeights:
    """The part of an ``ExpertKernel`` that keeps weights; kernels add what they compute."""

    def __init__(
        self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device | None
    ) -> None:
        """shapes: [out, in] of each matrix of an expert; there are no slots yet. None: CPU."""
        self._weights = [torch.zeros((0, *s), dtype=dtype, device=device) for s in shapes]

    def resize(self, num_slots: int) -> None:
        """See ``ExpertKernel``; new slots hold zeros, whose pages are given out when written."""
        self._weights = [_resized(old, num_slots) for old in self._weights]

    def store(self, slot: int, matrix: int, weight: Tensor) -> None:
        """Copy one matrix of one expert to the device."""
        self._weights[matrix][slot].copy_(weight)

    def read(self, slot: int, matrix: int) -> Tensor:
        """A copy of one matrix of one expert, as it was stored, on the CPU."""
        weight = self._weights[matrix][slot]
        return weight.clone() if weight.device.type == "cpu" else weight.cpu()

    def clear(self, slot: int) -> None:
        """Zero a slot."""
        for weights in self._weights:
            weights[slot].zero_()


def _resized(weights: Tensor, num_slots: int) -> Tensor:
    """[slots, ..] -> [num_slots, ..]: the same slots first, then zeros."""
    new = weights.new_zeros((num_slots, *weights.shape[1:]))
    kept = min(len(weights), num_slots)
    new[:kept] = weights[:kept]
    return new
