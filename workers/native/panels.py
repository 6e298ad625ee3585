"""Packing of weights into panels, the layout that the kernels read (``c/product.h``)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from workers.native import memory
from workers.native.library import Library
from workers.native.thread_team import ThreadTeam, check

PANEL = 32
"""Number of outputs (matrix rows) in a panel. The last panel is padded with zeros."""
DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes that the kernels support; the index of a dtype is its number in C."""


def packed_bytes(shape: tuple[int, int], dtype: torch.dtype, is_gated: bool = False) -> int:
    """Return the size of a packed matrix [out, in] in bytes."""
    return num_panels(shape[0], is_gated) * PANEL * _row_units(shape[1], dtype) * 4


def pack(
    library: Library, weight: Tensor, is_gated: bool = False, team: ThreadTeam | None = None
) -> Tensor:
    """Pack a CPU matrix [out, in] into panels, int32 [panels, units, 32].

    A unit is one float32 or two bfloat16 of a row. ``is_gated``: the matrix has gate rows followed
    by up rows, which alternate in panels, 16 of each. ``team``: an idle team that helps the calling
    thread.
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
    """Return the matrix [out, in] from which ``packed`` was made, bit for bit."""
    rows, width = shape
    units = _row_units(width, dtype)
    assert packed.dtype == torch.int32
    assert packed.is_contiguous()
    assert packed.shape == (num_panels(rows, is_gated), units, PANEL), tuple(packed.shape)
    weight = torch.empty(rows, units * 4 // dtype.itemsize, dtype=dtype)
    unpack_rows(library, packed, weight, units, is_gated)
    return weight[:, :width].contiguous()


class Runs(NamedTuple):
    """Placement of a panel's units (4-byte parts of 32 rows): runs of ``units`` units, with gaps of
    ``gap`` words between runs."""

    units: int
    gap: int = 0


def pack_rows(
    library: Library,
    packed: Tensor,
    rows: Tensor,
    units: int,
    is_gated: bool,
    team: ThreadTeam | None = None,
    runs: Runs | None = None,
) -> None:
    """Pack matrix rows of ``units`` times 4 bytes into panels.

    rows [rows, ..]; packed [panels, words] int32 or [panels, units, 32], filled from the first word
    of each panel on. ``runs``: placement of the units, by default in one run.
    """
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
    """Copy panels back into matrix rows: the inverse of ``pack_rows``."""
    run = library.functions.panels_unpack
    addresses = rows.data_ptr(), packed.data_ptr()
    places = packed.stride(0), *(runs or Runs(units))
    run(*addresses, rows.shape[0], units, *places, is_gated)


def num_panels(rows: int, is_gated: bool) -> int:
    """Number of panels of a matrix with ``rows`` rows; ``is_gated``: half of them are gate rows."""
    return -(-rows // 2 // (PANEL // 2)) if is_gated else -(-rows // PANEL)


def _row_units(width: int, dtype: torch.dtype) -> int:
    return -(-width * dtype.itemsize // 4)
