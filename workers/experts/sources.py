"""Sources of expert weights: the interface, and the checkpoint on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from workers.model.config import BankSpec
from workers.model.loading.checkpoint import Checkpoint
from workers.quantization.formats import WeightFormat
from workers.quantization.matrix import QuantizedMatrix, Weight
from workers.quantization.rounding import quantize

Round = Callable[[Tensor, WeightFormat], QuantizedMatrix]
"""Function that quantizes a matrix, with the same bits as ``quantize``."""


class ExpertWeight(NamedTuple):
    """One matrix of one expert."""

    exchange: int
    """Index of the bank's exchange that uses the matrix."""
    matrix: int
    """Index of the matrix in ``ExchangeSpec.matrix_shapes``."""
    weight: Weight
    """Matrix [out, in] in CPU memory, in the format that ``ExchangeSpec.form_of`` returns; valid
    until the source reads the next matrix."""


class ExpertSource(Protocol):
    """Source of expert weights, such as the checkpoint; yields one matrix at a time. Used by one
    thread."""

    @property
    def num_bytes(self) -> int:
        """Number of bytes that the source has read so far."""

    def weights(self, bank: BankSpec, expert: int, dtype: torch.dtype) -> Iterator[ExpertWeight]:
        """Yield all matrices of a logical expert; matrices that are not quantized are in ``dtype``.

        The iterator raises an ``ExpertMeshError`` that names what it cannot read.
        """

    def close(self) -> None:
        """Release files, buffers and connections. The source cannot be used afterwards."""


class CheckpointSource:
    """Expert source that reads the checkpoint's files. Raises ``CheckpointError`` with the file or
    tensor that is wrong."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        take: Callable[[int], None] = lambda num_bytes: None,
        round_weight: Round = quantize,
    ) -> None:
        """Make a source over ``checkpoint``, which no other thread may use
        (``Checkpoint.another``).

        ``take`` is called after each matrix, with the matrix's size in memory in bytes; it may wait
        or raise. ``round_weight`` quantizes experts during loading.
        """
        self._checkpoint = checkpoint
        self._take = take
        self._round = round_weight
        self.num_bytes = 0
        """Number of bytes of tensors read so far, as stored on disk."""
        self._buffers: dict[tuple[int, int], Tensor] = {}

    def weights(self, bank: BankSpec, expert: int, dtype: torch.dtype) -> Iterator[ExpertWeight]:
        family, tensors = self._checkpoint.family, self._checkpoint.tensors
        for exchange in bank.exchanges:
            matrices = family.expert_matrices(bank, exchange.index, expert, tensors)
            for i, matrix in enumerate(matrices):
                form = exchange.form_of(i)
                weight: Weight
                if form is not None and self._checkpoint.keeps_codes:
                    weight = self._checkpoint.read_quantized(matrix, form)
                else:
                    read_as = dtype if form is None else torch.float32
                    out = self._buffer(matrix.shape, read_as)
                    weight = self._checkpoint.borrow(matrix.parts, read_as, out).view(matrix.shape)
                    weight = weight if form is None else self._round(weight, form)
                self.num_bytes += sum(map(self._checkpoint.num_bytes, matrix.parts))
                self._take(weight.nbytes)
                yield ExpertWeight(exchange.index, i, weight)
        self._checkpoint.files.confirm()

    def close(self) -> None:
        self._buffers.clear()
        self._checkpoint.files.close()

    def _buffer(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return the buffer into which all matrices of a shape are read, one at a time.

        If each matrix were a new allocation, gaps would remain between the packed weights: a third
        of their size in a bank of 512 x 256 experts.
        """
        if shape not in self._buffers:
            self._buffers[shape] = torch.empty(shape, dtype=dtype)
        return self._buffers[shape]
