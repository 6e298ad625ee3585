"""Tile sizes of the Triton expert kernels, by the height of their blocks (pairs per block)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from workers.quantization.formats import WeightFormat


@dataclass(frozen=True, slots=True)
class Tile:
    """Tile sizes and launch parameters of an expert kernel's program, for blocks of a given
    height."""

    gate_rows: int
    """Number of weight rows of the gate, and also of up, that a program multiplies."""
    rows: int
    """Number of weight rows that a program multiplies, for matrices other than gate and up."""
    row_bytes: int
    """Bytes of a weight row that a program reads at a time."""
    warps: int
    stages: int
    """Number of pipeline stages (concurrent reads), if shared memory is large enough."""


_LOW = Tile(gate_rows=32, rows=64, row_bytes=256, warps=4, stages=4)
_TILES = {
    64: Tile(gate_rows=64, rows=128, row_bytes=128, warps=4, stages=3),
    128: Tile(gate_rows=128, rows=256, row_bytes=128, warps=8, stages=4),
}
"""Tiles by block height for float16 and bfloat16. Lower blocks, and all blocks in float32, use
``_LOW``. Each tile was the fastest of 38 on an H100 for 64 experts of 2,048 x 1,024 in bfloat16.
The two products of 32,768 pairs reach 506 and 477 TFLOPS; ``torch.nn.functional.grouped_mm`` (2.11)
reaches 350 to 400, and needs the same time again to sort pairs and restore their order."""
_CODED_TILES = dict.fromkeys(_TILES, _TILES[64])
"""Tiles by block height for quantized weights, the fastest of six variants: more programs start,
which hide the cost of dequantization."""
TALLEST_BLOCK = {2: 128, 4: 64}
"""Maximum height of a block in pairs, by bytes of an input element."""
_INTERPRETED_SHARED_BYTES = 227 << 10
"""Shared memory of an H100 in bytes, assumed by the interpreter and for compiling without a
device."""


def tile_of(height: int, item_bytes: int, form: WeightFormat | None) -> Tile:
    """Return the tile sizes for blocks of ``height`` pairs with ``item_bytes`` per input
    element."""
    if item_bytes != 2:
        return _LOW
    return (_TILES if form is None else _CODED_TILES).get(height, _LOW)


def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program can use, in bytes."""
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
    """Return how many pipeline stages fit in shared memory.

    Each stage holds ``step`` columns of ``height`` input rows and ``rows_read`` weight rows.
    ``width``: columns of a matrix. Dequantized weights take additional memory.
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
    """Number of scales of one weight row that are read with ``step`` quantized values; see
    ``weight_tiles``."""
    group = form.group or width
    if group >= width or group % step == 0:
        return 1
    return step // group if step % group == 0 else step
