"""Random quantized matrices, in every format."""

from __future__ import annotations

import torch

from workers.quantization import rounding
from workers.quantization.formats import WeightFormat
from workers.quantization.matrix import QuantizedMatrix

FORMATS = [
    WeightFormat(codes="int8", group=128, scales="bfloat16"),
    WeightFormat(codes="int8", group=None),
    WeightFormat(codes="int8", group=64, scales="float16", has_zeros=True),
    WeightFormat(codes="e4m3", group=128),
    WeightFormat(codes="e4m3", group=320),
    WeightFormat(codes="int4", group=32, scales="bfloat16"),
    WeightFormat(codes="int4", group=128, scales="float16", has_zeros=True),
    WeightFormat(codes="int4", group=384, scales="bfloat16", has_zeros=True),
    WeightFormat(codes="int4", group=None, has_zeros=True),
    WeightFormat(codes="e2m1", group=32, scales="e8m0"),
    rounding.FORMATS["int4"],
]


def name_of(form: WeightFormat) -> str:
    zeros = " with zeros" if form.has_zeros else ""
    if form.zero_bits:
        zeros = f" with zeros of {form.zero_bits} bits"
    return f"{form}{zeros}".replace(" ", "-")


def random_matrix(form: WeightFormat, shape: tuple[int, int], seed: int = 1) -> QuantizedMatrix:
    """All codes but those that are not numbers; weights of about 0.1."""
    generator = torch.Generator().manual_seed(seed)
    matrix = QuantizedMatrix.empty(form, shape)
    matrix.codes.random_(0, 256, generator=generator)
    if form.codes == "e4m3":
        matrix.codes[matrix.codes & 0x7F == 0x7F] = 0
    if form.scales == "e8m0":
        matrix.scales.random_(121, 125, generator=generator)
    else:
        largest = {"int8": 127.0, "e4m3": 448.0, "int4": 7.0, "e2m1": 6.0}[form.codes]
        scales = 0.1 + torch.rand(matrix.scales.shape, generator=generator)
        matrix.scales.copy_(0.2 * scales / largest)
    if matrix.zeros is not None:
        least = -8 << form.zero_bits
        matrix.zeros.random_(least, -least, generator=generator)
    return matrix
