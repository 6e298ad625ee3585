"""Records internal values of a forward pass, for rows of requests with an inspection.

A ``BatchRecorder`` handles one micro-batch. It copies the values of each sequence's rows into the
sequence's ``Capture``. Each step creates new captures, so a failed step has no effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workers.model.attention import attention_map
from workers.model.attention_batch import AttentionBatch
from workers.requests.inspection import InspectionParams


@dataclass(frozen=True, slots=True)
class RouterRows:
    """Outputs of a bank's router for n rows: E logits per row, and its k chosen experts."""

    logits: Tensor
    """[n, E] model dtype or float32."""
    ids: Tensor
    """[n, k] int32."""
    weights: Tensor
    """[n, k] float32."""


@dataclass(slots=True)
class Capture:
    """Values of consecutive rows of one sequence in one micro-batch, on the CPU."""

    inspection: InspectionParams
    first: int
    """Position of the first row in its sequence."""
    row: int
    """Index of the capture's first row in the micro-batch."""
    count: int
    hidden: list[Tensor] = field(default_factory=list)
    """[n, H] float32 for each call of ``Recorder.hidden``."""
    routers: dict[int, RouterRows] = field(default_factory=dict)
    maps: list[Tensor] = field(default_factory=list)
    """[KV heads, query heads per KV head, n, keys] float32 attention map of each layer."""

    def rows_of(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Copy of this capture's rows of ``tensor``, on the CPU."""
        own = tensor[self.row : self.row + self.count]
        return own.to("cpu", dtype or tensor.dtype, copy=True)


class BatchRecorder:
    """``Recorder`` that copies values of one micro-batch into ``captures``."""

    def __init__(self, captures: Sequence[Capture]) -> None:
        self._captures = captures

    def hidden(self, state: Tensor) -> None:
        for capture in self._captures:
            if capture.inspection.hidden_states:
                capture.hidden.append(capture.rows_of(state, torch.float32))

    def router(self, bank: int, logits: Tensor, ids: Tensor, weights: Tensor) -> None:
        for capture in self._captures:
            if capture.inspection.reads_routers:
                capture.routers[bank] = RouterRows(
                    capture.rows_of(logits),
                    capture.rows_of(ids, torch.int32),
                    capture.rows_of(weights, torch.float32),
                )

    def attending(self, queries: Tensor, cache: Tensor, batch: AttentionBatch) -> None:
        captures = {c.row: c for c in self._captures if c.inspection.attentions}
        for chunk in batch.prefills:
            if chunk.first in captures:
                captures[chunk.first].maps.append(attention_map(queries, cache, chunk, batch).cpu())
