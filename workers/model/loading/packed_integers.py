"""Matrices stored as integers of 4 or 8 bits, several in an int32.

A matrix ``X.weight`` [out, in] with groups of neighbours in a row is stored as follows:

- GPTQ: ``X.qweight`` [in / 8, out], ``X.qzeros`` [groups, out / 8], ``X.scales`` [groups, out];
  ``X.g_idx`` [in], the group of each column, which may be left out;
- AWQ: ``X.qweight`` [in, out / 8], ``X.qzeros`` [groups, out / 8], ``X.scales`` [groups, out];
  eight neighbours are in another order;
- compressed-tensors: ``X.weight_packed`` [out, in / 8], ``X.weight_scale`` [out, groups], and
  ``X.weight_zero_point`` [out / 8, groups] where zero points are not all alike.

The shapes are for 4 bits; for 8 bits, an eighth becomes a quarter. Values and zero points are
unsigned and become signed by subtracting 8 or 128. The first element is in the lowest bits.

Source: the layouts that AutoGPTQ, AutoAWQ and compressed-tensors write, as vLLM's and
transformers' loaders read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from cluster.core.errors import CheckpointError
from workers.model.config import TensorPart
from workers.quantization.matrix import QuantizedMatrix, pack_nibbles
from workers.quantization.storage_format import Method, StorageFormat

_WEIGHT: Final = ".weight"
_SUFFIXES: Final[Mapping[Method, tuple[str, str, str]]] = {
    "gptq": (".qweight", ".scales", ".qzeros"),
    "awq": (".qweight", ".scales", ".qzeros"),
    "compressed-tensors": (".weight_packed", ".weight_scale", ".weight_zero_point"),
}
"""Suffixes of the names of the tensors with values, scales and zero points, by quantization
method."""
_AWQ_PLACES: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""Position, within an int32 of AWQ, of each of eight neighbouring values."""
_INT32_BITS: Final = 32


def codes_name(name: str, stored: StorageFormat) -> str:
    """Return the name of the tensor with the packed values of the matrix ``name``; empty if the
    matrix cannot be stored as packed integers."""
    if stored.method not in _SUFFIXES or not name.endswith(_WEIGHT):
        return ""
    return name.removesuffix(_WEIGHT) + _SUFFIXES[stored.method][0]


def groups_name(name: str) -> str:
    """Return the name of the optional GPTQ tensor with the group index of each column of the matrix
    ``name``."""
    return f"{name.removesuffix(_WEIGHT)}.g_idx"


def stored_parts(part: TensorPart, stored: StorageFormat) -> list[TensorPart]:
    """Return the tensors in which a matrix is stored as packed integers: values, scales and, if the
    format stores them, zero points. Raises ``CheckpointError`` for a part that is not a whole
    matrix."""
    if len(part.shape) != 2 or part.rows is not None or part.is_transposed:
        raise CheckpointError(
            f"tensor {part.name} {list(part.shape)} is missing: only whole matrices may be stored "
            f"as {stored.method} says"
        )
    form, (rows, columns) = stored.form, part.shape
    each, groups = _INT32_BITS // form.code_bits, form.num_groups(columns)
    shapes = {
        "gptq": ((columns // each, rows), (groups, rows), (groups, rows // each)),
        "awq": ((columns, rows // each), (groups, rows), (groups, rows // each)),
        "compressed-tensors": ((rows, columns // each), (rows, groups), (rows // each, groups)),
    }[stored.method]
    prefix = part.name.removesuffix(_WEIGHT)
    found = [
        TensorPart(name=prefix + suffix, shape=shape)
        for suffix, shape in zip(_SUFFIXES[stored.method], shapes, strict=True)
    ]
    return found if form.has_zeros or stored.method != "compressed-tensors" else found[:2]


def as_stored(
    part: TensorPart, stored: StorageFormat, tensors: list[Tensor], groups: Tensor | None
) -> QuantizedMatrix:
    """Return the quantized matrix that is stored in ``tensors``, which ``stored_parts`` names.

    ``groups`` [in]: GPTQ's group index of each column (``g_idx``); None: not stored. Raises
    ``CheckpointError`` if the columns of a group are not neighbours, and for zero points that
    ``quantization_config`` does not allow.
    """
    form, columns = stored.form, part.shape[1]
    if groups is not None:
        _check_groups(part.name, groups, form.group or columns)
    codes, scales, *packed_zeros = tensors
    is_by_row = stored.method == "compressed-tensors"
    zeros = None
    if packed_zeros:
        numbers = _integers(packed_zeros[0].T if is_by_row else packed_zeros[0], stored)
        whole = (numbers.int() + stored.zero_offset) & ((1 << form.code_bits) - 1)
        zeros = (whole - (1 << (form.code_bits - 1))).T
    if zeros is not None and not form.has_zeros:
        if zeros.count_nonzero():
            raise CheckpointError(
                f"tensor {part.name}: its zero points differ, although quantization_config "
                "requires equal ones"
            )
        zeros = None
    return QuantizedMatrix(
        format=form,
        shape=(part.shape[0], columns),
        codes=_codes(codes, stored),
        scales=(scales if is_by_row else scales.T).float().contiguous(),
        zeros=None if zeros is None else zeros.to(torch.int8).contiguous(),
    )


def _codes(packed: Tensor, stored: StorageFormat) -> Tensor:
    """Return the values as signed integers, [out, bytes] uint8 in the layout of
    ``QuantizedMatrix.codes``."""
    form = stored.form
    if stored.method == "awq":
        unsigned = _integers(packed, stored).T.contiguous()
        found = pack_nibbles(unsigned)
    else:
        by_row = packed if stored.method == "compressed-tensors" else packed.T
        found = by_row.contiguous().view(torch.uint8)
    return found ^ (0x88 if form.code_bits == 4 else 0x80)


def _integers(packed: Tensor, stored: StorageFormat) -> Tensor:
    """Unpack int32 numbers, [n, m / 8] for 4 bits or [n, m / 4] for 8 bits, into unsigned values
    [n, m] uint8."""
    bits = stored.form.code_bits
    shifts = torch.arange(0, _INT32_BITS, bits, dtype=torch.int32)
    found = (packed.unsqueeze(2) >> shifts) & ((1 << bits) - 1)
    if stored.method == "awq":
        found = found[:, :, list(_AWQ_PLACES)]
    return found.flatten(1).to(torch.uint8)


def _check_groups(name: str, groups: Tensor, group: int) -> None:
    expected = torch.arange(len(groups)) // group
    if not torch.equal(groups.long(), expected):
        raise CheckpointError(
            f"tensor {groups_name(name)}: columns of a group must be neighbours "
            "(desc_act is not supported)"
        )
