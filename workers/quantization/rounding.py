"""Quantization of matrices during loading (``--quantize``).

In 8 bits, the largest number of a group maps to the largest value, and all numbers are rounded to
the nearest value. A 4-bit value represents scale * (value - zero point). The candidate scales
divide a group's range, including 0, into 15 to 8 steps; the best candidate is refined by least
squares, and the scale with the least squared error is used. 15 steps equal Q4_1 of llama.cpp; fewer
steps recover the grid of weights that were quantized before with wider groups. The values of a
group depend on its numbers alone, and sums have a fixed order, so all machines and
``workers.native`` get the same bits.

Source: the search over scales of ``make_qkx2_quants`` in llama.cpp's ggml-quants.c; unlike there,
each error includes the rounding of scale and zero point.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from workers.quantization.formats import WeightFormat
from workers.quantization.matrix import QuantizedMatrix, pack_nibbles, scale_dtype

IntegerCodes = Literal["int8", "int4"]
FORMATS: Final[dict[IntegerCodes, WeightFormat]] = {
    "int8": WeightFormat(codes="int8", group=128, scales="bfloat16"),
    "int4": WeightFormat(codes="int4", group=32, scales="bfloat16", has_zeros=True, zero_bits=4),
}
"""Formats into which matrices are quantized during loading: 8.125 and 4.75 bits per weight."""
_SHORT_GROUP = 24
"""Alternative group size for 4-bit matrices outside the experts: 5 bits per weight."""
_MAX = {"int8": 127, "int4": 7}
_LEAST, _MOST = -8, 7
_STEPS = (15.0, 14.0, 13.0, 12.0, 11.0, 10.0, 9.0, 8.0)
"""Candidate numbers of steps into which a 4-bit scale divides a group's range. If two candidates
have the same error, the first one is used."""
_NUM_REFINEMENTS = 2
_CHAINS = 4
"""Number of interleaved partial sums in a sum over a group's numbers."""
_NAN = 0x7FC0
_GROUPS_AT_ONCE = 8192
"""Number of groups that are quantized together: their numbers fit in a processor's cache."""
_ROWS_AT_ONCE = 256


def candidates(form: WeightFormat, width: int) -> list[WeightFormat]:
    """Return the formats to try for a matrix outside the experts, with rows of ``width``.

    The formats are ``form``, and one with shorter groups if these divide rows evenly. If errors are
    equal, the first format is used.
    """
    if not form.has_zeros or width % _SHORT_GROUP:
        return [form]
    return [form, replace(form, group=_SHORT_GROUP)]


def squared_error(matrix: QuantizedMatrix, weight: Tensor) -> float:
    """Return the sum of squared differences between a quantized matrix and its weight [out, in],
    the same on all machines."""
    found = 0.0
    for first in range(0, len(weight), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        own = weight[rows].float()
        parts = [part[rows] for part in matrix.parts]
        shape = (len(own), weight.shape[1])
        off = QuantizedMatrix.of_parts(matrix.format, shape, parts).dequantized() - own
        found += float(_halved((off * off).flatten()))
    return found


def quantize(weight: Tensor, form: WeightFormat) -> QuantizedMatrix:
    """Quantize weight [out, in] to an integer format with float scales; formats with zero points
    must be among ``candidates``."""
    if form.has_zeros:
        return quantize_with_zeros(weight, form)
    rows, width = weight.shape
    numbers = in_groups(weight, form)
    most = _MAX[form.codes]
    scales = (numbers.abs().amax(2) / most).to(scale_dtype(form))
    codes = (numbers / _divisors(scales).unsqueeze(2)).round_().clamp_(-most, most)
    codes = codes.to(torch.int8).view(rows, -1)[:, :width]
    stored = codes.contiguous().view(torch.uint8)
    if form.code_bits == 4:
        stored = pack_nibbles(functional.pad(stored, (0, width % 2)) & 15)
    return QuantizedMatrix(format=form, shape=(rows, width), codes=stored, scales=scales)


def quantize_with_zeros(weight: Tensor, form: WeightFormat) -> QuantizedMatrix:
    """Quantize weight [out, in] to one of the 4-bit ``candidates``: the reference of
    ``c/rounding.c``."""
    assert form in candidates(FORMATS["int4"], _SHORT_GROUP), f"{form} is not made here"
    rows, width = weight.shape
    groups = in_groups(weight, form).flatten(0, 1)
    starts = range(0, len(groups), _GROUPS_AT_ONCE)
    parts = [_rounded(groups[i : i + _GROUPS_AT_ONCE].T.contiguous()) for i in starts]
    codes, scales, zeros = (torch.cat(own) for own in zip(*parts, strict=True))
    return of_groups(form, (rows, width), codes, scales, zeros)


def in_groups(weight: Tensor, form: WeightFormat) -> Tensor:
    """Reshape weight [out, in] to [out, groups, group] float32, with zeros at the end of a row."""
    rows, width = weight.shape
    group = form.group or width
    return functional.pad(weight.float(), (0, -width % group)).view(rows, -1, group)


def of_groups(
    form: WeightFormat, shape: tuple[int, int], codes: Tensor, scales: Tensor, zeros: Tensor
) -> QuantizedMatrix:
    """Make a quantized matrix of ``shape`` from its groups: values [groups, bytes], scales and zero
    points [groups]."""
    rows, width = shape
    stored = codes.view(rows, -1)[:, : form.row_bytes(width)].contiguous()
    parts = stored, scales.view(rows, -1), zeros.view(rows, -1)
    return QuantizedMatrix.of_parts(form, shape, parts)


class _Codes(NamedTuple):
    """Scales and zero points of n groups, each field [n]: a number becomes scale * (value -
    zero)."""

    scale: Tensor
    """Scale of each group, exact in bfloat16."""
    zero: Tensor
    """Zero point of each group, a multiple of 1/16."""
    error: Tensor
    """Sum of squared errors of each group; NaN if the scale is 0 or NaN."""


def _rounded(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize n groups x [group, n] float32 to 4 bits. Returns values [n, group / 2] uint8, scales
    [n] bfloat16 and zero points [n] int8."""
    total = _sum(x)
    low, high = x.amin(0).clamp_(max=0.0), x.amax(0).clamp_(min=0.0)
    span = (high - low) + total * 0.0  # keeps NaN
    found: _Codes | None = None
    for steps in _STEPS:
        scale = _bfloat16(span * float(torch.tensor(1.0) / steps))
        other = _codes(x, scale, _LEAST - low / scale)
        found = other if found is None else _better(found, other)
    assert found is not None
    for _ in range(_NUM_REFINEMENTS):
        found = _better(found, _fitted(x, found, total))
    codes = _code(x * (1.0 / found.scale) + found.zero).T.to(torch.int8).view(torch.uint8)
    scales = found.scale.to(torch.bfloat16)
    scales.view(torch.int16).masked_fill_(scales.isnan(), _NAN)  # torch's differ
    return pack_nibbles(codes & 15), scales, (found.zero * 16.0).to(torch.int8)


def _codes(x: Tensor, scale: Tensor, zero: Tensor) -> _Codes:
    """Return the scales, the nearest zero points that can be stored, and the errors with which
    these represent groups x [group, n]."""
    stored = (zero * 16.0).round_().clamp_(-128.0, 127.0).nan_to_num_(-128.0) * 0.0625
    place = x * (1.0 / scale) + stored
    off = _code(place) - place
    return _Codes(scale, stored, _sum(off * off) * (scale * scale))


def _better(found: _Codes, other: _Codes) -> _Codes:
    is_less = other.error < found.error
    return _Codes(*(torch.where(is_less, b, a) for a, b in zip(found, other, strict=True)))


def _fitted(x: Tensor, found: _Codes, total: Tensor) -> _Codes:
    """Fit scale and zero point of groups x [group, n] by least squares to the quantized values that
    ``found`` gives. ``total`` [n]: sum of each group."""
    codes = _code(x * (1.0 / found.scale) + found.zero)
    sums = _sum(codes)
    mean = sums * (1.0 / len(x))
    covered, spread = _sum(codes * x) - mean * total, _sum(codes * codes) - mean * sums
    scale = _bfloat16(covered / spread)
    return _codes(x, scale, mean - total * (1.0 / len(x)) / scale)


def _code(place: Tensor) -> Tensor:
    return place.round().clamp_(_LEAST, _MOST).nan_to_num_(_LEAST)


def _sum(x: Tensor) -> Tensor:
    """Sum over the first axis of x [group, n], as four interleaved partial sums, then their sum."""
    chains = x.view(-1, _CHAINS, x.shape[1])
    sums = chains[0].clone()
    for chain in chains[1:]:
        sums += chain
    return (sums[0] + sums[1]) + (sums[2] + sums[3])


def _halved(x: Tensor) -> Tensor:
    """Sum x [n] by adding the second half to the first half until one number is left."""
    while len(x) > 1:
        half = len(x) // 2
        x = torch.cat((x[:half] + x[half : 2 * half], x[2 * half :]))
    return x[0]


def _bfloat16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


def _divisors(scales: Tensor) -> Tensor:
    """Return the number by which to divide each group: its scale, or 1 if the scale is 0 (a group
    of zeros)."""
    found = scales.float()
    return found.masked_fill_(found == 0, 1.0)
