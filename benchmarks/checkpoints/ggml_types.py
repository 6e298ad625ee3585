"""Types of numbers in files of llama.cpp: floats, and blocks of 32 integers with a scale.

Source: ggml's ``ggml.h`` (codes of types), ``ggml-common.h`` (layouts) and ``ggml-quants.c``
(``quantize_row_q8_0_ref``, ``quantize_row_q4_0_ref``), llama.cpp's ``llama.h`` (types of files).
We differ in ties of Q8_0, which go to the even integer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

BLOCK = 32
"""Neighbours in a row that share a scale."""
_SCALE_BYTES = 2
"""float16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GgmlType:
    """How a tensor's numbers are stored."""

    name: str
    code: int
    """Of tensors."""
    file_type: int
    """Of a file whose matrices are of this type."""
    block: int
    """Numbers of a row that are stored together; the length of a row is a multiple of it."""
    block_bytes: int
    encode: Callable[[Tensor], Tensor]
    """[.., columns] of any float type -> the bytes of each row, [.., bytes] uint8."""

    @property
    def bits(self) -> float:
        """Of a number, with its share of a scale."""
        return 8 * self.block_bytes / self.block

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Of a tensor [.., columns]."""
        assert shape[-1] % self.block == 0, f"{shape} in blocks of {self.block}"
        return torch.Size(shape).numel() // self.block * self.block_bytes


def _floats(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    return numbers.to(dtype).contiguous().view(torch.uint8)


def _q8_0(numbers: Tensor) -> Tensor:
    """The largest number of a block becomes 127 or -127."""
    blocks = _blocks(numbers)
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    codes = (blocks * _inverse(scales)).round_().to(torch.int8)
    return _joined(scales, codes.view(torch.uint8))


def _q4_0(numbers: Tensor) -> Tensor:
    """The largest number of a block becomes -8, those of the other sign reach to 7.

    Codes are 8 more; the first half of a block is in the lower halves of its bytes.
    """
    blocks = _blocks(numbers)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scales = largest / -8
    codes = (blocks * _inverse(scales)).add_(8.5).to(torch.uint8).clamp_(max=15)
    return _joined(scales, codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4)


def _blocks(numbers: Tensor) -> Tensor:
    """[.., columns] -> [.., blocks, 32] float32."""
    return numbers.float().reshape(*numbers.shape[:-1], -1, BLOCK)


def _inverse(scales: Tensor) -> Tensor:
    """1 / scales; a block of zeros has the scale 0, and here 0."""
    return scales.reciprocal().masked_fill_(scales == 0, 0.0)


def _joined(scales: Tensor, codes: Tensor) -> Tensor:
    """scales [.., blocks, 1] and codes [.., blocks, n] -> [.., bytes] uint8."""
    return torch.cat((scales.half().view(torch.uint8), codes), -1).flatten(-2)


F32 = GgmlType(
    name="F32",
    code=0,
    file_type=0,
    block=1,
    block_bytes=4,
    encode=partial(_floats, dtype=torch.float32),
)
BF16 = GgmlType(
    name="BF16",
    code=30,
    file_type=32,
    block=1,
    block_bytes=2,
    encode=partial(_floats, dtype=torch.bfloat16),
)
Q8_0 = GgmlType(
    name="Q8_0", code=8, file_type=7, block=BLOCK, block_bytes=_SCALE_BYTES + BLOCK, encode=_q8_0
)
Q4_0 = GgmlType(
    name="Q4_0",
    code=2,
    file_type=2,
    block=BLOCK,
    block_bytes=_SCALE_BYTES + BLOCK // 2,
    encode=_q4_0,
)
