"""8-bit keys and values of a KV cache.

A row is the vector of one head and token: D values in e4m3 (1 bit sign, 4 bits exponent, 3 bits
mantissa, no infinity), then one byte with their scale. The scale is a power of two, stored as the
exponent bits of a float32. It is the smallest one with which no element exceeds 448, the largest
number of e4m3. So an element keeps 4 significant bits; elements below 2 ** -14 of the largest one
keep fewer. A vector with NaN or infinity reads as NaN. A row of zero bytes is a row of zeros.

Example: the vector (3.0, -0.3), D = 2, has the scale 2 ** -7 (byte 120) and the values 384 and -40
(-38.4 rounded), which read as (3.0, -0.3125).

Source: "FP8 formats for deep learning" (Micikevicius et al., 2022) for the elements; "OCP
Microscaling Formats (MX) Specification v1.0" for scales of 8 bits. There a scale belongs to 32
elements, and an element between 448 and 512 times the scale becomes 448.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cluster.config.kv_cache import FP8_SCALE_BYTES

ROW_DTYPE = torch.uint8
"""Dtype of an fp8 KV cache. No other KV cache has this dtype, so code recognizes an fp8 cache by
it."""
_NAN_CODE = 0x7F
_NAN_SCALE = 0xFF


def row_bytes(dim: int) -> int:
    """Return the bytes of an fp8 cache row: ``dim`` 8-bit values and their scale."""
    return dim + FP8_SCALE_BYTES


def encode(vectors: Tensor) -> Tensor:
    """Quantize vectors [..., D] to fp8 cache rows [..., D + 1] uint8 (D values in e4m3, then their
    scale), rounding to nearest, ties to even."""
    x = vectors.float()
    largest = x.abs().amax(-1, keepdim=True)
    is_finite = largest.isfinite()
    # 448 is 1.75 * 2 ** 8: a mantissa above 1.75 takes the next exponent.
    bits = torch.where(is_finite, largest, 0.0).view(torch.int32)
    scales = (((bits + 0x1FFFFF) >> 23) - 8).clamp(min=1)
    inverse = ((254 - scales) << 23).view(torch.float32)
    codes = (x * inverse).to(torch.float8_e4m3fn).view(ROW_DTYPE)
    row = torch.cat((codes, scales.to(ROW_DTYPE)), -1)
    nothing = torch.full_like(row, _NAN_CODE)
    nothing[..., -1] = _NAN_SCALE
    return torch.where(is_finite, row, nothing)


def decode(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize fp8 cache rows [..., D + 1] uint8 to vectors [..., D] of ``dtype``. The conversion
    is exact, even to bfloat16."""
    codes = rows[..., :-1].view(torch.float8_e4m3fn).float()
    scales = (rows[..., -1:].int() << 23).view(torch.float32)
    return codes.mul_(scales).to(dtype)
