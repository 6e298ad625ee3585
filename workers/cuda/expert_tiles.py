"""How the work of expert kernels is cut into programs, by the height of their blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from workers.quantization.formats import WeightFormat


@dataclass(frozen=True, slots=True)
class Tile:
    """How a program's work is cut for blocks of a height."""

    gate_rows: int
    """Rows of weights that a program multiplies, of gate and up each."""
    rows: int
    """The same of other matrices."""
    row_bytes: int
    """Bytes of a row of weights that it reads at a time."""
    warps: int
    stages: int
    """Reads under way at once, where shared memory has room for them."""


_LOW = Tile(gate_rows=32, rows=64, row_bytes=256, warps=4, stages=4)
_TILES = {
    64: Tile(gate_rows=64, rows=128, row_bytes=128, warps=4, stages=3),
    128: Tile(gate_rows=128, rows=256, row_bytes=128, warps=8, stages=4),
}
"""By height of half types; lower blocks have ``_LOW``, as have all of float32. Fastest of 38 forms
each on an H100 for 64 experts of 2,048 x 1,024 in bfloat16. Products of 32,768 pairs: 506 and 477
TFLOPS, where ``torch.nn.functional.grouped_mm`` (2.11) makes 350 to 400 and its pairs have to be
sorted and put back, which takes as long again."""
_CODED_TILES = dict.fromkeys(_TILES, _TILES[64])
"""The same of codes, of six forms: more programs become numbers of their codes meanwhile."""
TALLEST_BLOCK = {2: 128, 4: 64}
"""By bytes of a number."""
_INTERPRETED_SHARED_BYTES = 227 << 10
"""Of an H100, for the interpreter and for compiling without a device."""


def tile_of(height: int, item_bytes: int, form: WeightFormat | None) -> Tile:
    """The tile for blocks of ``height`` pairs whose inputs have ``item_bytes`` each."""
    if item_bytes != 2:
        return _LOW
    return (_TILES if form is None else _CODED_TILES).get(height, _LOW)


def shared_bytes(device: torch.device) -> int:
    """What a program can have of shared memory."""
    if device.type != "cuda":
        return _INTERPRETED_SHARED_BYTES
    properties: Any = torch.cuda.get_device_properties(device)
    found: int = properties.shared_memory_per_block_optin
    return found


def num_stages(
    tile: Tile,
    step: int,
    height: int,
    rows_read: int,
    width: int,
    form: WeightFormat | None,
    device: torch.device,
) -> int:
    """Reads under way at once, of ``step`` columns for ``height`` pairs and ``rows_read`` rows.

    ``width``: columns of a matrix. Codes become numbers of shared memory of their own.
    """
    room = shared_bytes(device)
    row_bytes = tile.row_bytes
    if form is not None:
        room -= rows_read * row_bytes
        row_bytes = form.row_bytes(step) + _groups_read(form, width, step) * (
            form.scale_bytes + form.has_zeros
        )
    stage_bytes = height * tile.row_bytes + rows_read * row_bytes
    return max(1, min(tile.stages, room // stage_bytes))


def _groups_read(form: WeightFormat, width: int, step: int) -> int:
    """Scales of a row that are read with ``step`` codes; see ``weight_tiles``."""
    group = form.group or width
    if group >= width or group % step == 0:
        return 1
    return step // group if step % group == 0 else step
