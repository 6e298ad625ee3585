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
    """weight [out, in], in an integer format with float scales.

    Without zero points, the largest number of a group gets the largest code. With them, the codes
    of a group reach from its least number, or 0, to its largest one, or 0.
    """
    rows, width = weight.shape
    group = form.group or width
    numbers = functional.pad(weight.float(), (0, -width % group)).view(rows, -1, group)
    most = _MAX[form.codes]
    if form.has_zeros:
        low, high = numbers.amin(2).clamp_(max=0), numbers.amax(2).clamp_(min=0)
        scales = _stored((high - low) / (2 * most + 1), form)
        divisors = _divisors(scales)
        zeros = (-(most + 1) - low / divisors).round_().clamp_(-most - 1, most)
    else:
        scales = _stored(numbers.abs().amax(2) / most, form)
        divisors = _divisors(scales)
        zeros = torch.zeros_like(divisors)
    codes = (numbers / divisors.unsqueeze(2)).round_().add_(zeros.unsqueeze(2))
    codes = codes.clamp_(-most - form.has_zeros, most).to(torch.int8).view(rows, -1)[:, :width]
    stored = codes.contiguous().view(torch.uint8)
    if form.code_bits == 4:
        stored = pack_nibbles(functional.pad(stored, (0, width % 2)) & 15)
    return QuantizedMatrix(
        format=form,
        shape=(rows, width),
        codes=stored,
        scales=scales,
        zeros=zeros.to(torch.int8) if form.has_zeros else None,
    )


def _stored(scales: Tensor, form: WeightFormat) -> Tensor:
    return scales.to(scale_dtype(form))


def _divisors(scales: Tensor) -> Tensor:
    """By which numbers are divided; a group of zeros has the scale 0, and codes of 0."""
    found = scales.float()
    return found.masked_fill_(found == 0, 1.0)
