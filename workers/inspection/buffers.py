"""Inspection buffers collect the results of committed steps by position, in bounded memory.

Rows that a sequence computes again after a preemption are skipped, so that no row counts twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.inspection.recorder import Capture, RouterRows
from workers.model.config import BankSpec, ModelConfig
from workers.requests.inspection import (
    InspectionParams,
    ModelShape,
    NamedArray,
    Pooling,
    RouterShape,
)


def shape_of(config: ModelConfig, banks: Sequence[BankSpec]) -> ModelShape:
    """Dimensions that determine the result sizes. The predictor's bank is not included."""
    return ModelShape(
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_attention_layers=len(config.kv_layers),
        num_heads=config.num_heads,
        vocab_size=config.vocab_size,
        num_labels=len(config.labels),
        banks=tuple(
            RouterShape(
                name=f"{bank.bank}:{bank.layer}",
                num_experts=bank.num_experts,
                top_k=bank.top_k,
                aux_copies=bank.aux_copies,
            )
            for bank in banks
            if bank.layer < config.num_layers
        ),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRows:
    """Results that one step adds to the inspection of one sequence."""

    first: int
    """Position of the step's first row of the sequence."""
    hidden: Tensor
    """[count, H]: hidden states after the final norm."""
    logits: Mapping[int, Tensor]
    """Logits [V] float32 by position, if requested."""
    logprobs: Mapping[int, float]
    """Log-probabilities of labels, by position of the label."""
    captures: Sequence[Capture]
    """Recorded internal values, in the order of positions."""


class InspectionBuffers:
    """Collects the results of one request's inspection over its steps."""

    def __init__(
        self,
        inspection: InspectionParams,
        length: int,
        config: ModelConfig,
        banks: Sequence[BankSpec],
    ) -> None:
        self._inspection = inspection
        self._length = length
        self._config = config
        self._banks = tuple(banks)
        self._next = 0
        self._logits: dict[int, Tensor] = {}
        self._logprobs = np.full(length if inspection.labels else 0, np.nan, dtype=np.float32)
        self._sum = torch.zeros(config.hidden_size, dtype=torch.float64)
        self._arrays: dict[str, NDArray[Any]] = {}
        self._aux: dict[str, NDArray[np.float64]] = {}

    def add(self, rows_found: StepRows) -> None:
        """Add the results of a committed step."""
        self._logits.update(rows_found.logits)
        for position, value in rows_found.logprobs.items():
            self._logprobs[position] = value
        for capture in rows_found.captures:
            self._add_capture(capture, max(self._next, capture.first))
        self._pool(rows_found, max(self._next - rows_found.first, 0))
        self._next = max(self._next, rows_found.first + len(rows_found.hidden))

    def arrays(self) -> Iterator[NamedArray]:
        """Yield all results as named arrays. Call it after the last row was added."""
        if self._logits:
            positions = sorted(self._logits)
            yield _named("logits", torch.stack([self._logits[i] for i in positions]).numpy())
        if self._inspection.labels:
            yield _named("logprobs", self._logprobs)
        if self._inspection.embedding is not None:
            mean = self._inspection.embedding is Pooling.MEAN
            pooled = self._sum / self._length if mean else self._sum
            yield _named("embedding", pooled.float().numpy())
        for name, array in self._arrays.items():
            yield _named(name, array)
        for name, sums in self._aux.items():
            yield _named(name, sums.astype(np.float32))

    def _pool(self, rows_found: StepRows, skip: int) -> None:
        kind = self._inspection.embedding
        if kind is Pooling.MEAN:
            for row in rows_found.hidden[skip:].double().cpu():
                self._sum += row  # one by one, so that the sum does not depend on chunks
        elif kind is Pooling.LAST and rows_found.first + len(rows_found.hidden) == self._length:
            self._sum = rows_found.hidden[-1].double().cpu()

    def _add_capture(self, capture: Capture, begin: int) -> None:
        """Add the rows of ``capture`` from position ``begin`` on."""
        skip, end = begin - capture.first, capture.first + capture.count
        if skip >= capture.count:
            return
        own = slice(begin, end)
        config, length = self._config, self._length
        if capture.hidden:
            states = torch.stack(capture.hidden)[:, skip:].numpy()
            wide = (config.num_layers + 1, length, config.hidden_size)
            self._array("hidden_states", *wide)[:, own] = states
        if capture.maps:
            maps = torch.stack([self._by_head(m) for m in capture.maps])[:, :, skip:].numpy()
            shape = (len(config.kv_layers), config.num_heads, length, length)
            self._array("attentions", *shape)[:, :, own, :end] = maps[..., :end]
        for index, rows in capture.routers.items():
            self._add_router(self._banks[index], rows, skip, own)

    def _by_head(self, maps: Tensor) -> Tensor:
        """Reshape ``Capture.maps`` to [heads, n, keys], in the model's own order of heads."""
        return (maps.transpose(0, 1) if self._config.has_tiled_heads else maps).flatten(0, 1)

    def _add_router(self, bank: BankSpec, rows_found: RouterRows, skip: int, own: slice) -> None:
        name, inspection = f"{bank.bank}:{bank.layer}", self._inspection
        logits, ids = rows_found.logits[skip:], rows_found.ids[skip:]
        if inspection.router_logits:
            rows = self._array(f"router_logits:{name}", self._length, bank.num_experts)
            rows[own] = logits.float().numpy()
        if inspection.routes:
            shape = (self._length, bank.top_k)
            self._array(f"topk_ids:{name}", *shape, dtype=np.int32)[own] = ids.numpy()
            self._array(f"topk_weights:{name}", *shape)[own] = rows_found.weights[skip:].numpy()
        if inspection.aux:
            scores = logits.float() if bank.aux_dtype == "float32" else logits
            chosen = ids.flatten().long()
            sums = self._aux.setdefault(f"aux:{name}", np.zeros((2, bank.num_experts)))
            sums[0] += torch.bincount(chosen, minlength=bank.num_experts).numpy()
            # row by row, so that the sum does not depend on chunks
            rows = np.vstack((sums[1], scores.softmax(-1).double().numpy()))
            sums[1] = np.add.accumulate(rows, axis=0)[-1]

    def _array(self, name: str, *shape: int, dtype: type = np.float32) -> NDArray[Any]:
        """The buffer with this name, initially zeros."""
        if name not in self._arrays:
            self._arrays[name] = np.zeros(shape, dtype=dtype)
        return self._arrays[name]


def _named(name: str, array: NDArray[Any]) -> NamedArray:
    kind = "int32" if array.dtype == np.int32 else "float32"
    data = array.astype("<i4" if kind == "int32" else "<f4", copy=False).tobytes()
    return NamedArray(name=name, dtype=kind, shape=array.shape, data=data)
