"""Packing of quantized weights into panels, as the kernels read them (``c/quantized.h``)."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from workers.native import memory
from workers.native.library import Library
from workers.native.panels import (
    PANEL,
    Runs,
    num_panels,
    pack,
    pack_rows,
    packed_bytes,
    unpack_rows,
)
from workers.native.structs import c_struct
from workers.native.thread_team import ThreadTeam
from workers.quantization.formats import WeightFormat
from workers.quantization.matrix import QuantizedMatrix, Weight

_CODES = ("int8", "e4m3", "int4", "e2m1")
_SCALES = ("float32", "bfloat16", "float16", "e8m0")
_LINE_BYTES, _WORD_BYTES = 64, 4
_WHOLE_ROW = 1 << 40
"""Group size for formats with one scale per row; it exceeds the width of every row."""


@c_struct("layout.h", "form")
class FormFields(ctypes.Structure):
    """C ``struct form``: format of a matrix's weights; all zeros if they are not quantized."""


def form_fields(form: WeightFormat | None) -> FormFields:
    """Return the C struct of a weight format; all fields are 0 if weights are not quantized."""
    if form is None:
        return FormFields()
    return FormFields(
        codes=_CODES.index(form.codes) + 1,
        scales=_SCALES.index(form.scales),
        has_zeros=form.has_zeros,
        zero_bits=form.zero_bits,
        group=form.group or _WHOLE_ROW,
    )


def weight_bytes(
    shape: tuple[int, int], dtype: torch.dtype, form: WeightFormat | None, is_gated: bool = False
) -> int:
    """Return the size in bytes of a packed matrix [out, in]; ``form`` None: not quantized."""
    if form is None:
        return packed_bytes(shape, dtype, is_gated)
    return num_panels(shape[0], is_gated) * _Sections.of(form, shape[1]).panel_words * _WORD_BYTES


def pack_weight(
    library: Library, weight: Weight, is_gated: bool = False, team: ThreadTeam | None = None
) -> Tensor:
    """Pack a CPU matrix [out, in] into panels, quantized or not.

    ``is_gated`` and ``team``: see ``panels.pack``. The result is int32: [panels, units, 32] for a
    tensor, [panels, words] for a quantized matrix, which must have an even width.
    """
    if isinstance(weight, Tensor):
        return pack(library, weight, is_gated, team)
    form, (rows, width) = weight.format, weight.shape
    assert width % 2 == 0, f"{width} inputs"
    sections = _Sections.of(form, width)
    panels = num_panels(rows, is_gated)
    packed = memory.empty((panels, sections.panel_words), torch.int32)
    first = 0
    for part in weight.parts[1:]:
        place = sections.lanes(packed, part.dtype, first)
        place.copy_(sections.split(_to_lanes(part, is_gated)))
        first += place.shape[2] * PANEL * part.itemsize
    units = sections.row_words
    spare = units * _WORD_BYTES - weight.codes.shape[1]
    codes = functional.pad(weight.codes, (0, spare)) if spare else weight.codes.contiguous()
    if form.code_bits == 4:
        codes = codes.clone()
        library.functions.quantized_to_halves(codes.data_ptr(), rows * units)
    words = packed[:, sections.header_words :]
    pack_rows(library, words, codes, units, is_gated, team, sections.runs)
    return packed


def unpack_quantized(
    library: Library,
    packed: Tensor,
    form: WeightFormat,
    shape: tuple[int, int],
    is_gated: bool = False,
) -> QuantizedMatrix:
    """Return the matrix [out, in] from which ``packed`` was made, bit for bit."""
    rows, width = shape
    panels = num_panels(rows, is_gated)
    assert packed.dtype == torch.int32
    sections = _Sections.of(form, width)
    assert packed.shape == (panels, sections.panel_words), tuple(packed.shape)
    found = QuantizedMatrix.empty(form, shape)
    first = 0
    for part in found.parts[1:]:
        place = sections.lanes(packed, part.dtype, first)
        lanes = place.reshape(panels, -1, PANEL)[:, : part.shape[1]]
        part.copy_(_from_lanes(lanes, rows, is_gated))
        first += place.shape[2] * PANEL * part.itemsize
    units = sections.row_words
    codes = torch.empty(rows, units * _WORD_BYTES, dtype=torch.uint8)
    words = packed[:, sections.header_words :]
    unpack_rows(library, words, codes, units, is_gated, sections.runs)
    if form.code_bits == 4:
        library.functions.quantized_from_halves(codes.data_ptr(), rows * units)
    found.codes.copy_(codes[:, : found.codes.shape[1]])
    return found


class _Sections(NamedTuple):
    """Sections of a panel of quantized weights (C ``struct layout``).

    A section has the scales and zero points of one or two groups, which fill cache lines, then the
    codes (quantized values) of these groups. The last section may have fewer codes.
    """

    num_sections: int
    num_groups: int
    """Number of groups in a section."""
    header_words: int
    """Number of 4-byte words with the scales and zero points of a section."""
    row_words: int
    """Number of 4-byte words with the codes (quantized values) of a row."""
    group_words: int
    """Number of 4-byte words with the codes (quantized values) of a group in a row."""

    @classmethod
    def of(cls, form: WeightFormat, width: int) -> _Sections:
        """Return the sections of a panel, for a quantized matrix with ``width`` columns."""
        group_bytes = PANEL * (form.scale_bytes + form.has_zeros)
        num_groups = 2 if group_bytes % _LINE_BYTES else 1
        return cls(
            num_sections=-(-form.num_groups(width) // num_groups),
            num_groups=num_groups,
            header_words=num_groups * group_bytes // _WORD_BYTES,
            row_words=_row_words(form, width),
            group_words=_row_words(form, min(form.group or width, width)),
        )

    @property
    def panel_words(self) -> int:
        """Number of 4-byte words of a panel."""
        return self.num_sections * self.header_words + self.row_words * PANEL

    @property
    def runs(self) -> Runs:
        """Placement of the codes (quantized values) in a panel, between the section headers."""
        return Runs(self.num_groups * self.group_words, self.header_words)

    def lanes(self, packed: Tensor, dtype: torch.dtype, first: int) -> Tensor:
        """View section headers from byte ``first`` on as [panels, sections, groups, 32]."""
        values = packed.view(dtype)
        in_word = _WORD_BYTES // dtype.itemsize
        section_words = self.header_words + self.num_groups * self.group_words * PANEL
        shape = packed.shape[0], self.num_sections, self.num_groups, PANEL
        strides = values.stride(0), section_words * in_word, PANEL, 1
        return values.as_strided(shape, strides, values.storage_offset() + first // dtype.itemsize)

    def split(self, lanes: Tensor) -> Tensor:
        """Reshape [panels, groups, 32] -> [panels, sections, groups, 32], padded with zeros."""
        spare = self.num_sections * self.num_groups - lanes.shape[1]
        padded = functional.pad(lanes, (0, 0, 0, spare))
        return padded.view(lanes.shape[0], self.num_sections, self.num_groups, PANEL)


def _row_words(form: WeightFormat, width: int) -> int:
    """Return the number of words for ``width`` codes of a row."""
    return -(-form.row_bytes(width) // _WORD_BYTES)


def _to_lanes(values: Tensor, is_gated: bool) -> Tensor:
    """Reorder [rows, groups] -> [panels, groups, 32], padded with zeros."""
    halves = values.chunk(2) if is_gated else (values,)
    lanes = PANEL // len(halves)
    padded = [functional.pad(half, (0, 0, 0, -len(half) % lanes)) for half in halves]
    panels = torch.cat([half.view(-1, lanes, values.shape[1]) for half in padded], 1)
    return panels.transpose(1, 2).contiguous()


def _from_lanes(lanes: Tensor, rows: int, is_gated: bool) -> Tensor:
    """Reorder [panels, groups, 32] -> [rows, groups], without padding: the inverse of
    ``_to_lanes``."""
    halves = lanes.transpose(1, 2).chunk(2 if is_gated else 1, 1)
    flat = [half.reshape(-1, lanes.shape[1])[: rows // len(halves)] for half in halves]
    return torch.cat(flat)
