"""Checkpoints that are not on disk: random weights, drawn when they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from benchmarks.random_checkpoint import RandomModel
from workers.model.config import TensorPart
from workers.model.families.registry import load_family
from workers.model.loading.checkpoint import Checkpoint


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
    ) -> None:
        """``config``: or ``config.json``; ``device``: where weights are drawn; ``head_gain``
        multiplies the head's: greedy choices become clear."""
        content = config.config() if isinstance(config, RandomModel) else config
        self.path = Path("random")
        self.family = load_family(content)
        self.config = self.family.config
        self.tensors = {}
        self.checkpoint_id = "random"
        self.loaded_bytes = 0
        self._readers = {}
        self._progress = None
        self._total_bytes = 0
        self._device = device
        self._head_gain = head_gain
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

    def _draw(self, part: TensorPart, dtype: torch.dtype) -> Tensor:
        shape, device = part.part_shape, self._device
        if len(shape) == 1:
            is_bias = part.name.endswith("bias")
            return torch.full(shape, 0.0 if is_bias else 1.0, dtype=dtype, device=device)
        self._generator.manual_seed(crc32(f"{part.name} {part.index} {part.rows}".encode()))
        numbers = torch.randn(shape, device=device, generator=self._generator)
        if "embed_tokens" not in part.name:
            gain = self._head_gain if "lm_head" in part.name else 1.0
            numbers.mul_(gain / shape[-1] ** 0.5)
        return numbers.to(torch.bfloat16).to(dtype)
