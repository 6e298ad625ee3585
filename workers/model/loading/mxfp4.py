"""MXFP4 weights: 4-bit floats in blocks of 32, each with a scale.

Source: Open Compute Project, "OCP Microscaling Formats (MX) Specification" 1.0 (2023): elements of
E2M1, a scale of E8M0 for 32 neighbours. Tensors as in gpt-oss: ``NAME`` [.., rows, columns] is
stored as ``NAME_blocks`` [.., rows, columns / 32, 16], two elements per byte, the first one in its
lower half, and ``NAME_scales`` [.., rows, columns / 32]. Products are exact in bfloat16.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from workers.model.config import TensorPart
from workers.quantization.formats import WeightFormat
from workers.quantization.matrix import QuantizedMatrix

DTYPE = "U8"
"""Dtype of the tensors with MXFP4 blocks and scales, in safetensors spelling."""
BLOCK = 32
FORMAT = WeightFormat(codes="e2m1", group=BLOCK, scales="e8m0")


def stored_parts(part: TensorPart) -> tuple[TensorPart, TensorPart]:
    """Return the two tensors in which an MXFP4 matrix is stored: blocks and scales."""
    *outer, columns = part.shape
    counts = (*outer, columns // BLOCK)
    blocks = replace(part, name=f"{part.name}_blocks", shape=(*counts, BLOCK // 2), is_mxfp4=False)
    scales = replace(part, name=f"{part.name}_scales", shape=counts, is_mxfp4=False)
    return blocks, scales


def as_stored(blocks: Tensor, scales: Tensor) -> QuantizedMatrix:
    """Return the quantized matrix [rows, 32 n] of MXFP4 blocks [rows, n, 16] and scales [rows, n],
    both uint8."""
    shape = (scales.shape[0], BLOCK * scales.shape[1])
    return QuantizedMatrix(format=FORMAT, shape=shape, codes=blocks.flatten(1), scales=scales)


def decoded(blocks: Tensor, scales: Tensor) -> Tensor:
    """Dequantize MXFP4 blocks [rows, n, 16] with scales [rows, n], both uint8: [rows, 32 n]
    bfloat16.

    If a scale is 255 (NaN), all numbers of its block become NaN.
    """
    return as_stored(blocks, scales).dequantized().to(torch.bfloat16)
