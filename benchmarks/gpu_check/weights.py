"""Checkpoints that are not on disk: random weights, drawn when they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from benchmarks.checkpoints.random_checkpoint import RandomModel
from benchmarks.checkpoints.random_codes import draw_matrix
from workers.model.config import ExpertMatrix, TensorPart
from workers.model.families.registry import load_family
from workers.model.loading.checkpoint import Checkpoint
from workers.model.loading.expert_format import with_form
from workers.model.loading.mapped import MappedFiles
from workers.quantization.formats import WeightFormat
from workers.quantization.matrix import QuantizedMatrix

_JOINS_EMBEDDING = "eh_proj.weight"
"""Of a prediction layer: its matrix for an embedding and a hidden state, side by side."""


class RandomCheckpoint(Checkpoint):
    """Matrices of normal numbers that keep the size of a row, norms of ones, biases of zeros.

    A tensor's numbers follow from its name, and from the kind of device that draws them. They are
    those of bfloat16 in any type.
    """

    def __init__(
        self,
        config: RandomModel | Mapping[str, Any],
        device: torch.device,
        head_gain: float = 1.0,
        *,
        form: WeightFormat | None = None,
        zeros: tuple[str, ...] = (),
        deltas: Mapping[str, Tensor] | None = None,
    ) -> None:
        """``config``: or ``config.json``; ``device``: where weights are drawn; ``head_gain``
        multiplies the head's: greedy choices become clear; ``form``: of the experts' codes.

        ``zeros``: ends of names of matrices that are zero; where that of a prediction layer which
        joins embedding and hidden state is among them, it passes the embedding on. ``deltas`` are
        added to the matrices of these names, in float32.
        """
        self.path = Path("random")
        self.family = config.described() if isinstance(config, RandomModel) else load_family(config)
        self.family.banks = with_form(self.family.banks, form)
        self.keeps_codes = True
        self.config = self.family.config
        self.tensors = {}
        self.checkpoint_id = "random"
        self.loaded_bytes = 0
        self.files = MappedFiles({}, {})
        self._progress = None
        self._total_bytes = 0
        self._device = device
        self._head_gain = head_gain
        self._zeros = zeros
        self._deltas = deltas or {}
        self._generator = torch.Generator(device)

    def num_bytes(self, part: TensorPart) -> int:
        return torch.Size(part.part_shape).numel() * torch.bfloat16.itemsize

    def read_stacked(
        self, parts: Sequence[TensorPart], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """See ``Checkpoint``, but on the device where weights are drawn."""
        found = torch.cat([self._draw(part, dtype) for part in parts])
        if out is None or out.device != found.device:
            return found
        return out.copy_(found.reshape(out.shape))  # a bias may be wanted as a matrix

    def borrow(
        self, parts: Sequence[TensorPart], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        return self.read_stacked(parts, dtype, out)

    def read_quantized(self, matrix: ExpertMatrix, form: WeightFormat) -> QuantizedMatrix:
        """Codes and scales are drawn, for a matrix of such numbers as it has without codes."""
        first = matrix.parts[0]
        return draw_matrix(form, matrix.shape, self._seeded(first))

    def _seeded(self, part: TensorPart) -> torch.Generator:
        seed = crc32(f"{part.name} {part.index} {part.rows}".encode())
        return self._generator.manual_seed(seed)

    def _draw(self, part: TensorPart, dtype: torch.dtype) -> Tensor:
        shape, device = part.part_shape, self._device
        if len(shape) == 1:
            is_bias = part.name.endswith("bias")
            return torch.full(shape, 0.0 if is_bias else 1.0, dtype=dtype, device=device)
        numbers = torch.randn(shape, device=device, generator=self._seeded(part))
        if "embed_tokens" not in part.name:
            gain = self._head_gain if "lm_head" in part.name else 1.0
            numbers.mul_(gain / shape[-1] ** 0.5)
        if part.name.endswith(self._zeros):
            numbers.zero_()
            if part.name.endswith(_JOINS_EMBEDDING):
                numbers.fill_diagonal_(1.0)
        found = numbers.to(torch.bfloat16).to(dtype)
        delta = self._deltas.get(part.name)
        return found if delta is None else (found.float() + delta).to(dtype)
