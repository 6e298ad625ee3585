"""Quantizes matrices when they are loaded: each number becomes the nearest code."""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor
from torch.nn import functional

from workers.quantization.formats import WeightFormat
from workers.quantization.matrix import QuantizedMatrix, pack_nibbles, scale_dtype

IntegerCodes = Literal["int8", "int4"]
FORMATS: Final[dict[IntegerCodes, WeightFormat]] = {
    "int8": WeightFormat(codes="int8", group=128, scales="bfloat16"),
    "int4": WeightFormat(codes="int4", group=32, scales="bfloat16"),
}
"""Of matrices that are quantized at load: 8.125 and 4.5 bits a number."""
_MAX = {"int8": 127, "int4": 7}


def quantize(weight: Tensor, form: WeightFormat) -> QuantizedMatrix:
    """weight [out, in], in an integer format with float scales and without zero points.

    The largest number of a group gets the largest code.
    """
    assert not form.has_zeros, f"{form} with zero points"
    rows, width = weight.shape
    group = form.group or width
    numbers = functional.pad(weight.float(), (0, -width % group)).view(rows, -1, group)
    most = _MAX[form.codes]
    scales = (numbers.abs().amax(2) / most).to(scale_dtype(form))
    codes = (numbers / _divisors(scales).unsqueeze(2)).round_().clamp_(-most, most)
    codes = codes.to(torch.int8).view(rows, -1)[:, :width]
    stored = codes.contiguous().view(torch.uint8)
    if form.code_bits == 4:
        stored = pack_nibbles(functional.pad(stored, (0, width % 2)) & 15)
    return QuantizedMatrix(format=form, shape=(rows, width), codes=stored, scales=scales)


def _divisors(scales: Tensor) -> Tensor:
    """By which numbers are divided; a group of zeros has the scale 0, and codes of 0."""
    found = scales.float()
    return found.masked_fill_(found == 0, 1.0)
