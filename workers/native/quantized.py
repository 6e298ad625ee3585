"""Quantized weights in the order in which the kernels read them (``c/quantized.h``)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from workers.native import memory
from workers.native.library import Library
from workers.native.panels import PANEL, num_panels, pack, pack_rows, packed_bytes, unpack_rows
from workers.native.team import Team
from workers.quantization.formats import WeightFormat
from workers.quantization.matrix import QuantizedMatrix, Weight

_CODES = ("int8", "e4m3", "int4", "e2m1")
_SCALES = ("float32", "bfloat16", "float16", "e8m0")
_LINE_BYTES, _WORD_BYTES = 64, 4
_WHOLE_ROW = 1 << 40
"""Elements that no row has."""


class FormFields(ctypes.Structure):
    """``struct form``."""

    _fields_: ClassVar[Sequence[tuple[str, type]]] = [
        ("codes", ctypes.c_int64),
        ("scales", ctypes.c_int64),
        ("has_zeros", ctypes.c_int64),
        ("group", ctypes.c_int64),
    ]


def form_fields(form: WeightFormat | None) -> FormFields:
    """None: weights are not quantized."""
    if form is None:
        return FormFields()
    return FormFields(
        codes=_CODES.index(form.codes) + 1,
        scales=_SCALES.index(form.scales),
        has_zeros=form.has_zeros,
        group=form.group or _WHOLE_ROW,
    )


def weight_bytes(
    shape: tuple[int, int], dtype: torch.dtype, form: WeightFormat | None, is_gated: bool = False
) -> int:
    """Bytes of a packed matrix [out, in]."""
    if form is None:
        return packed_bytes(shape, dtype, is_gated)
    return num_panels(shape[0], is_gated) * _panel_words(form, shape[1]) * _WORD_BYTES


def pack_weight(
    library: Library, weight: Weight, is_gated: bool = False, team: Team | None = None
) -> Tensor:
    """See ``panels.pack``; a quantized matrix, of an even width, as int32 [panels, words]."""
    if isinstance(weight, Tensor):
        return pack(library, weight, is_gated, team)
    form, (rows, width) = weight.format, weight.shape
    assert width % 2 == 0, f"{width} inputs"
    packed = memory.empty((num_panels(rows, is_gated), _panel_words(form, width)), torch.int32)
    first = 0
    for part in weight.parts[1:]:
        lanes = _to_lanes(part, is_gated).flatten(1).view(torch.uint8)
        packed.view(torch.uint8)[:, first : first + lanes.shape[1]] = lanes
        first += lanes.shape[1]
    units = _code_words(form, width)
    spare = units * _WORD_BYTES - weight.codes.shape[1]
    codes = functional.pad(weight.codes, (0, spare)) if spare else weight.codes.contiguous()
    if form.code_bits == 4:
        codes = codes.clone()
        library.functions.quantized_to_halves(codes.data_ptr(), rows * units)
    words = packed[:, _header_words(form, width) :]
    pack_rows(library, words, codes, units, is_gated, team)
    return packed


def unpack_quantized(
    library: Library,
    packed: Tensor,
    form: WeightFormat,
    shape: tuple[int, int],
    is_gated: bool = False,
) -> QuantizedMatrix:
    """The matrix [out, in] from which ``packed`` was made, bit for bit."""
    rows, width = shape
    panels = num_panels(rows, is_gated)
    assert packed.dtype == torch.int32
    assert packed.shape == (panels, _panel_words(form, width)), tuple(packed.shape)
    found = QuantizedMatrix.empty(form, shape)
    first = 0
    for part in found.parts[1:]:
        num_bytes = PANEL * part.shape[1] * part.itemsize
        lanes = packed.view(torch.uint8)[:, first : first + num_bytes].contiguous()
        lanes = lanes.view(part.dtype).view(panels, part.shape[1], PANEL)
        part.copy_(_from_lanes(lanes, rows, is_gated))
        first += num_bytes
    units = _code_words(form, width)
    codes = torch.empty(rows, units * _WORD_BYTES, dtype=torch.uint8)
    words = packed[:, _header_words(form, width) :]
    unpack_rows(library, words, codes, units, is_gated)
    if form.code_bits == 4:
        library.functions.quantized_from_halves(codes.data_ptr(), rows * units)
    found.codes.copy_(codes[:, : found.codes.shape[1]])
    return found


def _code_words(form: WeightFormat, width: int) -> int:
    """Of a row."""
    return -(-form.row_bytes(width) // _WORD_BYTES)


def _header_words(form: WeightFormat, width: int) -> int:
    """Of a panel's scales and zero points, in whole cache lines."""
    num_bytes = PANEL * form.num_groups(width) * (form.scale_bytes + form.has_zeros)
    return -(-num_bytes // _LINE_BYTES) * _LINE_BYTES // _WORD_BYTES


def _panel_words(form: WeightFormat, width: int) -> int:
    return _header_words(form, width) + _code_words(form, width) * PANEL


def _to_lanes(values: Tensor, is_gated: bool) -> Tensor:
    """[rows, groups] -> [panels, groups, 32], zeros where a panel has no row."""
    halves = values.chunk(2) if is_gated else (values,)
    lanes = PANEL // len(halves)
    padded = [functional.pad(half, (0, 0, 0, -len(half) % lanes)) for half in halves]
    panels = torch.cat([half.view(-1, lanes, values.shape[1]) for half in padded], 1)
    return panels.transpose(1, 2).contiguous()


def _from_lanes(lanes: Tensor, rows: int, is_gated: bool) -> Tensor:
    """[panels, groups, 32] -> [rows, groups]."""
    halves = lanes.transpose(1, 2).chunk(2 if is_gated else 1, 1)
    flat = [half.reshape(-1, lanes.shape[1])[: rows // len(halves)] for half in halves]
    return torch.cat(flat)
