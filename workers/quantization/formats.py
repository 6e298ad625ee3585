"""Formats of quantized matrices, without their data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Codes = Literal["int8", "e4m3", "int4", "e2m1"]
"""Type of quantized values: two's complement integers of 8 or 4 bits, 8-bit floats (e4m3: 4 bits of
exponent, 3 of mantissa), or 4-bit floats (e2m1: 2 bits of exponent, 1 of mantissa)."""
ScaleDType = Literal["float32", "bfloat16", "float16", "e8m0"]
"""Type of the scales of a quantized matrix. ``e8m0`` is an 8-bit power of two, from 2**-127 up."""
_SCALE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "e8m0": 1}
GROUP_MULTIPLE = 8
"""Group sizes must be multiples of this number, so that each group begins at a whole word."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFormat:
    """Storage format of matrices [out, in]: quantized values, and a scale for each group of
    neighbouring values in a row.

    A weight is scale * (value - zero point). Source of the 8-bit and 4-bit floats: Micikevicius et
    al., "FP8 formats for deep learning" (2022); Open Compute Project, "OCP Microscaling Formats
    (MX) Specification" 1.0 (2023).
    """

    codes: Codes
    group: int | None
    """Number of neighbouring values in a row that share a scale, a multiple of 8; None: the whole
    row."""
    scales: ScaleDType = "float32"
    has_zeros: bool = False
    """Whether each group has a zero point, an int8. Only integer formats can have zero points."""
    zero_bits: int = 0
    """Number of fractional bits of a zero point: the unit of zero points is 2**-zero_bits."""

    @property
    def code_bits(self) -> int:
        return 8 if self.codes in ("int8", "e4m3") else 4

    @property
    def scale_bytes(self) -> int:
        return _SCALE_BYTES[self.scales]

    def num_groups(self, width: int) -> int:
        """Number of groups of a row; the last group may be shorter."""
        return 1 if self.group is None else -(-width // self.group)

    def row_bytes(self, width: int) -> int:
        """Number of bytes of a row's quantized values, without scales; half of the last byte is
        unused if the width is odd and a value has 4 bits."""
        return -(-width * self.code_bits // 8)

    def num_bytes(self, shape: tuple[int, int]) -> int:
        """Number of bytes of a matrix [out, in]: quantized values, scales and zero points."""
        rows, width = shape
        per_group = self.scale_bytes + self.has_zeros
        return rows * (self.row_bytes(width) + self.num_groups(width) * per_group)

    def __str__(self) -> str:
        """Text for logs, such as ``int4 in groups of 32``."""
        return f"{self.codes} in {'rows' if self.group is None else f'groups of {self.group}'}"
