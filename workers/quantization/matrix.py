"""Quantized matrices and their dequantization: the reference of all kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from workers.quantization.formats import Codes, WeightFormat

_SCALE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "e8m0": torch.uint8,
}
_E8M0_BIAS, _E8M0_NAN = 127, 255
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class QuantizedMatrix:
    """A quantized matrix [out, in] on the CPU."""

    format: WeightFormat
    shape: tuple[int, int]
    """Shape of the dequantized matrix, [out, in]."""
    codes: Tensor
    """Quantized values, [out, in] uint8; for 4 bits [out, in / 2], rounded up, lower half of a byte
    first."""
    scales: Tensor
    """Scales [out, groups] in the format's scale type; uint8 for ``e8m0``."""
    zeros: Tensor | None = None
    """Zero points [out, groups] int8, see ``WeightFormat.zero_bits``; None if the format has
    none."""

    @classmethod
    def empty(cls, form: WeightFormat, shape: tuple[int, int]) -> QuantizedMatrix:
        """Return a quantized matrix with undefined contents, to be filled in."""
        rows, width = shape
        groups = form.num_groups(width)
        return cls(
            format=form,
            shape=shape,
            codes=torch.empty(rows, form.row_bytes(width), dtype=torch.uint8),
            scales=torch.empty(rows, groups, dtype=scale_dtype(form)),
            zeros=torch.empty(rows, groups, dtype=torch.int8) if form.has_zeros else None,
        )

    @classmethod
    def of_parts(
        cls, form: WeightFormat, shape: tuple[int, int], parts: Sequence[Tensor]
    ) -> QuantizedMatrix:
        """Create a quantized matrix from its tensors: quantized values, scales, and zero points if
        any."""
        codes, scales, *zeros = parts
        return cls(
            format=form, shape=shape, codes=codes, scales=scales, zeros=zeros[0] if zeros else None
        )

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Tensors of the matrix, in this order: quantized values, scales, zero points if any."""
        return (self.codes, self.scales, *(() if self.zeros is None else (self.zeros,)))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def dequantized(self) -> Tensor:
        """Return the dequantized matrix [out, in] float32."""
        width = self.shape[1]
        group = self.format.group or width
        numbers = decode_codes(self.codes, self.format.codes)[:, :width]
        if self.zeros is not None:
            zeros = self.zeros.float() * 2.0**-self.format.zero_bits
            numbers = numbers - _by_element(zeros, group, width)
        return numbers * _by_element(self.float_scales(), group, width)

    def float_scales(self) -> Tensor:
        """Return the scales [out, groups] in float32."""
        if self.format.scales != "e8m0":
            return self.scales.float()
        exponents = self.scales.int() - _E8M0_BIAS
        found = torch.ldexp(torch.ones_like(self.scales, dtype=torch.float32), exponents)
        return found.masked_fill_(self.scales == _E8M0_NAN, torch.nan)


Weight = Tensor | QuantizedMatrix
"""A matrix of a model: a tensor in the model dtype, or a quantized matrix."""


def empty_weight(form: WeightFormat | None, shape: tuple[int, int], dtype: torch.dtype) -> Weight:
    """Return a matrix with undefined contents: quantized as ``form``, or in ``dtype`` if ``form``
    is None."""
    return torch.empty(shape, dtype=dtype) if form is None else QuantizedMatrix.empty(form, shape)


def plain(weight: Weight) -> Tensor:
    """Return ``weight`` as a tensor; it must not be quantized."""
    assert isinstance(weight, Tensor), f"{weight.format} weights"
    return weight


def parts_of(weight: Weight) -> tuple[Tensor, ...]:
    """Return all tensors of a matrix: the tensor itself, or quantized values, scales and any zero
    points."""
    return (weight,) if isinstance(weight, Tensor) else weight.parts


def scale_dtype(form: WeightFormat) -> torch.dtype:
    """Return the torch dtype of a format's scales; uint8 for ``e8m0``."""
    return _SCALE_DTYPES[form.scales]


def decode_codes(codes: Tensor, kind: Codes) -> Tensor:
    """Convert quantized values [.., bytes] uint8 to float32, without scales; with 4 bits, a byte
    has two values, and the result is [.., 2 * bytes]."""
    if kind == "int8":
        return codes.view(torch.int8).float()
    if kind == "e4m3":
        return codes.view(torch.float8_e4m3fn).float()
    pairs = _pairs(kind).index_select(0, codes.flatten().int())
    return pairs.view(*codes.shape[:-1], 2 * codes.shape[-1])


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack 4-bit values [.., n] uint8 into bytes [.., n / 2]; the first of two values is in the
    lower half."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def _by_element(of_groups: Tensor, group: int, width: int) -> Tensor:
    """Repeat each value of a group for all elements of the group: [rows, groups] ->
    [rows, width]."""
    return of_groups.repeat_interleave(group, 1)[:, :width]


@cache
def _pairs(kind: Codes) -> Tensor:
    """Return a table [256, 2] float32 of the two 4-bit numbers in each byte."""
    signed = [*range(8), *range(-8, 0)]
    numbers = torch.tensor(signed if kind == "int4" else [*_E2M1, *(-x for x in _E2M1)])
    byte = torch.arange(256)
    return torch.stack((numbers[byte % 16], numbers[byte // 16]), 1).float()
