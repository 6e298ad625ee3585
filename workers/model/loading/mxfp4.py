"""Weights that are stored as 4-bit floats in blocks of 32 with a scale.

Source: Open Compute Project, "OCP Microscaling Formats (MX) Specification" 1.0 (2023): elements of
E2M1, a scale of E8M0 for 32 neighbours. Tensors are as gpt-oss has them: of ``NAME`` [.., rows,
columns] there are ``NAME_blocks`` [.., rows, columns / 32, 16], two elements a byte, the first one
in its lower half, and ``NAME_scales`` [.., rows, columns / 32]. Products are exact in bfloat16.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from workers.model.config import TensorPart
from workers.quantization.formats import WeightFormat
from workers.quantization.matrix import QuantizedMatrix

DTYPE = "U8"
"""Of both tensors, in safetensors spelling."""
BLOCK = 32
FORMAT = WeightFormat(codes="e2m1", group=BLOCK, scales="e8m0")
_SCALE_BIAS, _NAN_SCALE = 127, 255
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def stored_parts(part: TensorPart) -> tuple[TensorPart, TensorPart]:
    """Blocks and scales of a matrix."""
    *outer, columns = part.shape
    counts = (*outer, columns // BLOCK)
    blocks = replace(part, name=f"{part.name}_blocks", shape=(*counts, BLOCK // 2), is_mxfp4=False)
    scales = replace(part, name=f"{part.name}_scales", shape=counts, is_mxfp4=False)
    return blocks, scales


def as_stored(blocks: Tensor, scales: Tensor) -> QuantizedMatrix:
    """blocks [rows, n, 16] and scales [rows, n], both uint8 -> the same matrix [rows, 32 n]."""
    shape = (scales.shape[0], BLOCK * scales.shape[1])
    return QuantizedMatrix(format=FORMAT, shape=shape, codes=blocks.flatten(1), scales=scales)


def decoded(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks [rows, n, 16] and scales [rows, n], both uint8 -> [rows, 32 n] bfloat16.

    A scale of 255 is not a number, and so is its block.
    """
    pairs = _pairs().index_select(0, blocks.flatten().int())
    numbers = pairs.view(torch.bfloat16).view(*scales.shape, BLOCK)
    exponents = (scales.int() - _SCALE_BIAS).unsqueeze(-1)
    found = torch.ldexp(numbers, exponents).to(torch.bfloat16)
    return found.masked_fill_((scales == _NAN_SCALE).unsqueeze(-1), torch.nan).flatten(1)


@cache
def _pairs() -> Tensor:
    """[256] int32: the two bfloat16 numbers of each byte."""
    numbers = torch.tensor([*_E2M1, *(-x for x in _E2M1)], dtype=torch.bfloat16)
    byte = torch.arange(256)
    pairs = torch.stack((numbers[byte % 16], numbers[byte // 16]), 1)
    return pairs.contiguous().view(torch.int32).flatten()
