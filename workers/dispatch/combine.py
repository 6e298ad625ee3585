"""How results combine: from the outputs that the expert ranks return to those of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.dispatch.dispatcher import DispatchHandle
from workers.model.weighting import weighted_sum


@dataclass(frozen=True, slots=True)
class SentRows:
    """The rows that one expert rank was sent, and so the outputs that it returns."""

    rank: int
    places: Tensor | None
    """Destination of the returned rows: rows [n] in ``sum`` mode, else pairs [P] in row-major order
    of [T, k]; None when all of them return, in order."""
    count: int
    """Rows that come back."""


@dataclass(frozen=True, slots=True)
class RemoteHandle(DispatchHandle):
    """A dispatch whose outputs the expert ranks return."""

    topk_weights: Tensor
    """[T, k] as dispatched."""
    sent: tuple[SentRows, ...] = ()
    """By expert rank; ranks that return nothing are left out."""


@dataclass(frozen=True, slots=True)
class OutputCombiner:
    """Decides how the outputs of the expert ranks add up to those of the rows."""

    dtype: torch.dtype
    """Of the model."""
    device: torch.device

    def combine(self, handle: RemoteHandle, received: Sequence[Tensor], by_pair: bool) -> Tensor:
        """Outputs as ``TokenDispatcher.combine`` returns them.

        received: from each rank that was sent rows, [count, width]: partial sums of rows, or
        ``by_pair`` an output of each pair.
        """
        exchange = handle.bank.exchanges[handle.exchange]
        if not by_pair:
            return self._add_partial_sums(handle, received, exchange.out_width)
        pairs = self._gather_pairs(handle, received, exchange.out_width)
        if not exchange.weighted:
            return pairs.view(handle.num_rows, handle.bank.top_k, exchange.out_width)
        return self._weigh(handle, pairs)

    def _add_partial_sums(
        self, handle: RemoteHandle, received: Sequence[Tensor], width: int
    ) -> Tensor:
        """Add in float32 in rank order and round once."""
        total: Tensor | None = None
        for sent, part in zip(handle.sent, received, strict=True):
            if sent.places is None:  # rows without a request come last
                part = part if sent.count == handle.num_rows else part[: handle.num_rows]
                total = part.float() if total is None else total.add_(part)
                continue
            if total is None:
                total = torch.zeros(handle.num_rows, width, device=self.device)
            total.index_add_(0, sent.places, part[: len(sent.places)].float())
        if total is None:
            total = torch.zeros(handle.num_rows, width, device=self.device)
        return total.to(self.dtype)

    def _gather_pairs(self, handle: RemoteHandle, received: Sequence[Tensor], width: int) -> Tensor:
        """Outputs of all pairs in row-major order [T * k, width]."""
        if len(received) == 1 and handle.sent[0].places is None:
            return received[0]
        shape = (handle.num_rows * handle.bank.top_k, width)
        pairs = torch.empty(shape, dtype=self.dtype, device=self.device)
        for sent, part in zip(handle.sent, received, strict=True):
            if sent.places is not None:
                pairs[sent.places] = part
        return pairs

    def _weigh(self, handle: RemoteHandle, pairs: Tensor) -> Tensor:
        """The sum of the local dispatcher, over the same pairs in the same order."""
        weights = handle.topk_weights.float().flatten()
        rows = torch.arange(len(pairs), device=pairs.device) // handle.bank.top_k
        float32_weights = handle.bank.float32_weights
        total = weighted_sum(pairs, weights, rows, handle.num_rows, float32_weights)
        return total.to(self.dtype)
