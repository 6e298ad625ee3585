"""Weights in the order in which the kernels read them (``c/product.h``)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from workers.native import memory
from workers.native.library import Library
from workers.native.team import Team, check

PANEL = 32
"""Outputs of a panel, the last of which is filled up with zeros."""
DTYPES = (torch.float32, torch.bfloat16)
"""Types that the kernels compute with; the place of each is its number in C."""


def packed_bytes(shape: tuple[int, int], dtype: torch.dtype, is_gated: bool = False) -> int:
    """Bytes of a packed matrix [out, in]."""
    return num_panels(shape[0], is_gated) * PANEL * _row_units(shape[1], dtype) * 4


def pack(
    library: Library, weight: Tensor, is_gated: bool = False, team: Team | None = None
) -> Tensor:
    """A CPU matrix [out, in] as panels: int32 [panels, units, 32], a unit being one float32 or two
    bfloat16 of a row. ``is_gated``: the rows of the gate, then those of up, which alternate in
    panels, 16 of each.

    A ``team`` that computes nothing at the time helps the calling thread.
    """
    assert weight.dtype in DTYPES, f"{weight.dtype} weights"
    assert weight.device.type == "cpu"
    rows, width = weight.shape
    units = _row_units(width, weight.dtype)
    if weight.dtype == torch.bfloat16 and width % 2:
        weight = functional.pad(weight, (0, 1))
    weight = weight.contiguous()
    packed = memory.empty((num_panels(rows, is_gated), units, PANEL), torch.int32)
    pack_rows(library, packed, weight, units, is_gated, team)
    return packed


def unpack(
    library: Library,
    packed: Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    is_gated: bool = False,
) -> Tensor:
    """The matrix [out, in] from which ``packed`` was made, bit for bit."""
    rows, width = shape
    units = _row_units(width, dtype)
    assert packed.dtype == torch.int32
    assert packed.is_contiguous()
    assert packed.shape == (num_panels(rows, is_gated), units, PANEL), tuple(packed.shape)
    weight = torch.empty(rows, units * 4 // dtype.itemsize, dtype=dtype)
    unpack_rows(library, packed, weight, units, is_gated)
    return weight[:, :width].contiguous()


class Runs(NamedTuple):
    """Where the units of a panel lie: ``units`` of them follow each other, and then ``gap`` words
    come that are others'."""

    units: int
    gap: int = 0


def pack_rows(
    library: Library,
    packed: Tensor,
    rows: Tensor,
    units: int,
    is_gated: bool,
    team: Team | None = None,
    runs: Runs | None = None,
) -> None:
    """rows [rows, ..] of ``units`` times 4 bytes -> packed [panels, words] int32 or [panels, units,
    32]: of each panel the words from the first one on, where ``runs`` says; None: in one run."""
    run = (library if team is None else team.library).functions.panels_pack
    pointer = None if team is None else team.pointer
    addresses = packed.data_ptr(), rows.data_ptr()
    places = packed.stride(0), *(runs or Runs(units))
    check(run(pointer, *addresses, rows.shape[0], units, *places, is_gated))


def unpack_rows(
    library: Library,
    packed: Tensor,
    rows: Tensor,
    units: int,
    is_gated: bool,
    runs: Runs | None = None,
) -> None:
    """The other way round."""
    run = library.functions.panels_unpack
    addresses = rows.data_ptr(), packed.data_ptr()
    places = packed.stride(0), *(runs or Runs(units))
    run(*addresses, rows.shape[0], units, *places, is_gated)


def num_panels(rows: int, is_gated: bool) -> int:
    """Of a matrix with so many rows."""
    return -(-rows // 2 // (PANEL // 2)) if is_gated else -(-rows // PANEL)


def _row_units(width: int, dtype: torch.dtype) -> int:
    return -(-width * dtype.itemsize // 4)
