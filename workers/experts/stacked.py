"""Weights of an expert kernel as one tensor a matrix: [slots, out, in]."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from workers.model.config import ExchangeSpec
from workers.model.layers import GatedActivation, gated_activation
from workers.model.side_stream import SideStream


class StackedWeights:
    """The part of an ``ExpertKernel`` that keeps weights; subclasses compute."""

    def __init__(
        self,
        exchange: ExchangeSpec,
        dtype: torch.dtype,
        device: torch.device,
        side: SideStream | None = None,
    ) -> None:
        """``side`` is for threads that store and read; by default one of these weights' own."""
        self._side = side or SideStream(device)
        shapes = exchange.matrix_shapes
        self._num_products = len(exchange.product_shapes)
        self._activate = gated_activation(exchange.activation)
        self._weights = [torch.zeros((0, *s), dtype=dtype, device=device) for s in shapes]

    def resize(self, num_slots: int) -> None:
        """See ``ExpertKernel``; new slots hold zeros, whose pages are given out when written."""
        self._weights = [_resized(old, num_slots) for old in self._weights]
        self._side.follow()

    def store(self, slot: int, matrix: int, weight: Tensor) -> None:
        with self._side.work():
            self._weights[matrix][slot].copy_(self._side.to_device(weight))

    def read(self, slot: int, matrix: int) -> Tensor:
        with self._side.work():
            return self._side.to_host(self._weights[matrix][slot].clone())

    def clear(self, slot: int) -> None:
        with self._side.work():
            for weights in self._weights:
                weights[slot].zero_()


def batched_products(
    blocks: Tensor, matrices: Iterable[Tensor], num_products: int, activate: GatedActivation
) -> Tensor:
    """blocks [B, rows, in], and for each matrix of an expert, see ``ExchangeSpec.matrix_shapes``,
    those of each block [B, out, in] -> [B, rows, out]."""
    known = list(matrices)
    weights, biases = known[:num_products], known[num_products:]
    for i, weight in enumerate(weights):
        blocks = torch.bmm(activate(blocks) if i else blocks, weight.transpose(1, 2))
        if biases:
            blocks += biases[i].transpose(1, 2)
    return blocks


def _resized(weights: Tensor, num_slots: int) -> Tensor:
    """[slots, ..] -> [num_slots, ..]: the same slots first, then zeros."""
    new = weights.new_zeros((num_slots, *weights.shape[1:]))
    kept = min(len(weights), num_slots)
    new[:kept] = weights[:kept]
    return new
