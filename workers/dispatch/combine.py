"""Combine: sums the outputs that the expert ranks return for the rows of an attention rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.dispatch.dispatcher import DispatchHandle
from workers.model.weighting import weighted_sum


@dataclass(frozen=True, slots=True)
class SentRows:
    """Rows sent to one expert rank, and where to add the outputs that the rank returns."""

    rank: int
    places: Tensor | None
    """Indices of the rows or pairs to which the returned outputs belong: rows [n] in combine mode
    ``sum``, else (row, slot) pairs [P] in row-major order of [T, k]. None if the rank returns
    outputs of all rows or pairs in order."""
    count: int
    """Number of outputs that the rank returns, for rows or for (row, slot) pairs."""


@dataclass(frozen=True, slots=True)
class RemoteHandle(DispatchHandle):
    """Handle of a dispatch to expert ranks, which return the outputs of the rows."""

    topk_weights: Tensor
    """Routing weights of the dispatched rows, [T, k]."""
    sent: tuple[SentRows, ...] = ()
    """Rows sent to each expert rank that returns outputs."""


@dataclass(frozen=True, slots=True)
class OutputCombiner:
    """Sums the outputs that the expert ranks return, for each row of a dispatch."""

    dtype: torch.dtype
    """Dtype of the model."""
    device: torch.device

    def combine(self, handle: RemoteHandle, received: Sequence[Tensor], by_pair: bool) -> Tensor:
        """Return the outputs of a dispatch in the model dtype, [T, width].

        Without routing weights (``ExchangeSpec.weighted`` is False) the shape is [T, k, width].
        received: one tensor [count, width] for each entry of ``handle.sent``, with a partial sum
        for each row or, if ``by_pair``, with the output of each (row, slot) pair.
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
        """Add the partial sums of each row in float32, in rank order; return them in the model
        dtype, [T, width]."""
        total: Tensor | None = None
        for sent, part in zip(handle.sent, received, strict=True):
            if sent.places is None:  # padding rows (without a request) are last
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
        """Return the outputs of all (row, slot) pairs in row-major order, [T * k, width]."""
        if len(received) == 1 and handle.sent[0].places is None:
            return received[0]
        shape = (handle.num_rows * handle.bank.top_k, width)
        pairs = torch.empty(shape, dtype=self.dtype, device=self.device)
        for sent, part in zip(handle.sent, received, strict=True):
            if sent.places is not None:
                pairs[sent.places] = part
        return pairs

    def _weigh(self, handle: RemoteHandle, pairs: Tensor) -> Tensor:
        """Return the weighted sum of each row's pairs, [T, width], with the bits that
        ``LocalDispatcher`` computes. pairs [T * k, width]."""
        weights = handle.topk_weights.float().flatten()
        rows = torch.arange(len(pairs), device=pairs.device) // handle.bank.top_k
        float32_weights = handle.bank.float32_weights
        total = weighted_sum(pairs, weights, rows, handle.num_rows, float32_weights)
        return total.to(self.dtype)
