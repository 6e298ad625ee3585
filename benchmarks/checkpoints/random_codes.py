"""Random matrices of experts in the formats in which public checkpoints store them.

The codes are drawn, not rounded: the numbers have the size of those of a model in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from workers.model.loading.mxfp4 import BLOCK
from workers.quantization.formats import WeightFormat
from workers.quantization.matrix import QuantizedMatrix, decode_codes, scale_dtype

Stored = Literal["bfloat16", "float8", "mxfp4"]
"""``float8``: as those of Qwen3's FP8 checkpoints; ``mxfp4``: as those of gpt-oss."""
_FLOAT8_BLOCK = 128
"""Rows, and columns, that share a scale."""
_FLOAT8_STD = 64.0
"""Of the codes; the largest one is 448."""
_E8M0_BIAS = 127
_E2M1_RMS = math.sqrt(8.5625)
"""Of all 16 codes: 0, 0.5, 1, 1.5, 2, 3, 4 and 6, with both signs."""

_E4M3_NAN = 0x7F
_MOST_ZERO = 8
"""Zero points reach from -8 to 7."""

QUANTIZATION: Mapping[Stored, Mapping[str, Any] | None] = {
    "bfloat16": None,
    "float8": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [_FLOAT8_BLOCK, _FLOAT8_BLOCK],
    },
    "mxfp4": {"quant_method": "mxfp4"},
}
"""``quantization_config`` of ``config.json``; None: there is none."""


def is_coded(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix of an expert, or of all experts of a layer."""
    return ".experts." in name and len(shape) >= 2 and not name.endswith("bias")


def draw(
    stored: Literal["float8", "mxfp4"],
    name: str,
    shape: tuple[int, ...],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The tensors on disk of a matrix [.., rows, columns], by name."""
    drawer = _float8 if stored == "float8" else _mxfp4
    return drawer(name, shape, generator)


def _float8(name: str, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """See ``workers.model.loading.scaled_blocks``."""
    *outer, rows, columns = shape
    codes = torch.randn(shape, generator=generator).mul_(_FLOAT8_STD).to(torch.float8_e4m3fn)
    counts = [-(-size // _FLOAT8_BLOCK) for size in (rows, columns)]
    scales = torch.full((*outer, *counts), columns**-0.5 / _FLOAT8_STD)
    return {name: codes, f"{name}_scale_inv": scales}


def _mxfp4(name: str, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """See ``workers.model.loading.mxfp4``."""
    *outer, columns = shape
    counts = (*outer, columns // BLOCK)
    codes = torch.randint(256, (*counts, BLOCK // 2), generator=generator, dtype=torch.uint8)
    exponent = round(math.log2(columns**-0.5 / _E2M1_RMS))
    scales = torch.full(counts, _E8M0_BIAS + exponent, dtype=torch.uint8)
    return {f"{name}_blocks": codes, f"{name}_scales": scales}


def draw_matrix(
    form: WeightFormat, shape: tuple[int, int], generator: torch.Generator
) -> QuantizedMatrix:
    """A matrix [out, in] in any format, where the generator is: all codes that are numbers, scales
    that differ from group to group, and zero points around 0."""
    rows, width = shape
    groups, place = form.num_groups(width), generator.device
    codes = torch.randint(
        256, (rows, form.row_bytes(width)), generator=generator, device=place, dtype=torch.uint8
    )
    if form.codes == "e4m3":
        codes.masked_fill_(codes & _E4M3_NAN == _E4M3_NAN, 0)
    every = torch.arange(256, dtype=torch.uint8)
    square = float(decode_codes(every, form.codes).nan_to_num(0.0).square().mean())
    zeros = None
    if form.has_zeros:
        span = (-_MOST_ZERO, _MOST_ZERO)
        zeros = torch.randint(*span, (rows, groups), generator=generator, device=place)
        zeros, square = zeros.to(torch.int8), square + _MOST_ZERO**2 / 3
    size = (width * square) ** -0.5
    if form.scales == "e8m0":
        middle = _E8M0_BIAS + round(math.log2(size))
        span = (middle - 1, middle + 2)
        scales = torch.randint(*span, (rows, groups), generator=generator, device=place)
    else:
        scales = size * (0.5 + torch.rand(rows, groups, generator=generator, device=place))
    return QuantizedMatrix(
        format=form, shape=shape, codes=codes, scales=scales.to(scale_dtype(form)), zeros=zeros
    )
