"""Experts: each program multiplies a block of pairs by a piece of their slot's weights.

With few rows, products take as long as it takes to read the weights, so a block may have few rows.
With many it is as high as pays for tensor cores. Outputs go to memory for each pair: a sum over a
row's pairs in their order is then the same each time. Reference: ``workers.experts.kernels_cpu``
and ``workers.model.weighting``, with the same roundings: gate and up, their product, a pair's
output and, if asked, its product with the weight. Where there are biases, a sum is rounded once
they are added, not before, and a clamped SwiGLU at its end alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.cuda.align import Blocks, align
from workers.cuda.language import MIN_DOT, cast, jit, rounded
from workers.cuda.weight_tiles import add_product, halves
from workers.quantization.formats import WeightFormat

Activation = Literal["silu", "gelu", "gelu_pytorch_tanh", "relu"]

_UNSORTED_PAIRS = 32
"""Up to so many, each is a block by itself: what a kernel saves that sorts them is less than its
launch, as 32 of 64 slots are 26 different ones on average, and the L2 cache has the others."""
_SUM_WIDTH = 1024


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
_TALLEST_BLOCK = {2: 128, 4: 64}
"""By bytes of a number."""
_INTERPRETED_SHARED_BYTES = 227 << 10
"""Of an H100, for the interpreter and for compiling without a device."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """(input row, expert slot) pairs for a kernel. Pair p is the p-th element of ``slots``."""

    slots: Tensor
    """[T, k] integers, -1 for none; elements of a row are neighbours."""
    blocks: Blocks | None
    """None: each pair is a block by itself."""
    sources: Tensor | None
    """[T * k] int64: the input row of each pair; None: see ``per_row``."""
    per_row: int
    """Neighbouring pairs that share an input row."""

    @property
    def num_blocks(self) -> int:
        return self.slots.numel() if self.blocks is None else self.blocks.num_blocks

    @property
    def height(self) -> int:
        """Rows of a tile."""
        return MIN_DOT if self.blocks is None else max(self.blocks.height, MIN_DOT)

    def of_outputs(self) -> Pairs:
        """The same pairs, of which each has an input row by itself."""
        return replace(self, sources=None, per_row=1)


def make_pairs(
    slots: Tensor, num_slots: int, sources: Tensor | None, per_row: int, dtype: torch.dtype
) -> Pairs:
    """Sort pairs, see ``Pairs``, for products with ``num_slots`` matrices of a type."""
    if slots.numel() <= _UNSORTED_PAIRS:
        return Pairs(slots, None, sources, per_row)
    height = MIN_DOT
    while height < _TALLEST_BLOCK[dtype.itemsize] and slots.numel() > height * num_slots:
        height *= 2
    return Pairs(slots, align(slots, num_slots, height), sources, per_row)


@dataclass(frozen=True, slots=True)
class Matrices:
    """One matrix of each slot, as it is or quantized (``workers.quantization``)."""

    weights: Tensor
    """[slots, out, in], or codes [slots, out, bytes] uint8."""
    width: int
    """Columns of a matrix: in."""
    form: WeightFormat | None = None
    """Of codes."""
    scales: Tensor | None = None
    """[slots, out, groups] of codes."""
    zeros: Tensor | None = None
    """[slots, out, groups] int8 of codes."""

    @classmethod
    def of(cls, parts: Sequence[Tensor], form: WeightFormat | None, width: int) -> Matrices:
        """``parts``: the weights, or codes, scales and zero points if there are any."""
        return cls(parts[0], width, form, *parts[1:])


@dataclass(frozen=True, slots=True)
class GateActivation:
    """What becomes of a gate and its up."""

    name: Activation | Literal["clamped_swiglu"]
    alpha: float = 1.0
    limit: float = 0.0
    """Of ``clamped_swiglu``: gate * sigmoid(alpha * gate) * (up + 1), within limits."""


def gate_up(
    inputs: Tensor,
    weights: Matrices,
    biases: Tensor | None,
    pairs: Pairs,
    activation: GateActivation,
) -> Tensor:
    """activation(gate x) * up x of each pair.

    inputs [N, in], weights [slots, 2 * inner, in] with the gate's rows first, biases [slots,
    2 * inner, 1] -> [P, inner], where rows of pairs without a slot hold anything. All contiguous,
    float32 or a half type, in which the numbers of codes are rounded, too.
    """
    inner, rows = weights.weights.shape[1] // 2, _tile(pairs, inputs, weights.form).gate_rows
    numbers = activation.alpha, activation.limit
    names = {"ACTIVATION": activation.name}
    return _launch(
        _gate_up, inputs, weights, biases, pairs, numbers, inner, rows, 2 * rows, **names
    )


def multiply(inputs: Tensor, weights: Matrices, biases: Tensor | None, pairs: Pairs) -> Tensor:
    """The product of each pair: inputs [N, in], weights [slots, out, in], biases [slots, out, 1]
    -> [P, out]."""
    rows, width = _tile(pairs, inputs, weights.form).rows, weights.weights.shape[1]
    return _launch(_multiply, inputs, weights, biases, pairs, (), width, rows, rows)


def sum_rows(
    outputs: Tensor, slots: Tensor, weights: Tensor, rounds_products: bool, dtype: torch.dtype
) -> Tensor:
    """The weighted sum over each row's pairs with a slot, in their order, in float32.

    outputs [T * k, out]; slots [T, k] integers, -1 for none; weights [T, k] float32
    -> [T, out] ``dtype``. ``rounds_products``: weights, and then products of weight and output,
    are rounded to the type of ``outputs``.
    """
    num_rows, top_k = slots.shape
    width = outputs.shape[1]
    out = outputs.new_empty(num_rows, width, dtype=dtype)
    _sum_rows[(num_rows, triton.cdiv(width, _SUM_WIDTH))](
        outputs,
        slots,
        weights,
        out,
        slots.stride(0),
        weights.stride(0),
        TOP_K=top_k,
        WIDTH=width,
        ROUNDS=rounds_products,
        TILE=_SUM_WIDTH,
        enable_fp_fusion=False,  # a product is rounded, as in torch
    )
    return out


def _tile(pairs: Pairs, inputs: Tensor, form: WeightFormat | None) -> Tile:
    if inputs.itemsize != 2:
        return _LOW
    return (_TILES if form is None else _CODED_TILES).get(pairs.height, _LOW)


def shared_bytes(device: torch.device) -> int:
    """What a program can have of shared memory."""
    if device.type != "cuda":
        return _INTERPRETED_SHARED_BYTES
    properties: Any = torch.cuda.get_device_properties(device)
    found: int = properties.shared_memory_per_block_optin
    return found


def _num_stages(tile: Tile, step: int, matrices: Matrices, height: int, rows_read: int) -> int:
    """Reads under way at once, of ``step`` columns for ``height`` pairs and ``rows_read`` rows.

    Codes become numbers of shared memory of their own.
    """
    room, form = shared_bytes(matrices.weights.device), matrices.form
    row_bytes = tile.row_bytes
    if form is not None:
        room -= rows_read * row_bytes
        row_bytes = form.row_bytes(step) + _groups_read(form, matrices.width, step) * (
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


def has_float8(device: torch.device) -> bool:
    """Whether a device converts float8 numbers: Ada, Hopper and later ones."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _launch(
    kernel: Any,
    inputs: Tensor,
    matrices: Matrices,
    biases: Tensor | None,
    pairs: Pairs,
    numbers: tuple[float, ...],
    width: int,
    rows: int,
    rows_read: int,
    **more: str,
) -> Tensor:
    """``rows``: of outputs of a program; ``rows_read``: of weights for them."""
    weights, form = matrices.weights, matrices.form
    assert form is not None or inputs.dtype == weights.dtype
    assert inputs.is_contiguous()
    tile = _tile(pairs, inputs, form)
    step = tile.row_bytes // inputs.itemsize
    num_slots = weights.shape[0]
    slots, blocks, sources = pairs.slots, pairs.blocks, pairs.sources
    out = inputs.new_empty(slots.numel(), width)
    kernel[(pairs.num_blocks * triton.cdiv(width, rows),)](
        inputs,
        weights,
        weights if biases is None else biases,
        weights if matrices.scales is None else matrices.scales,
        weights if matrices.zeros is None else matrices.zeros,
        out,
        slots,
        slots if blocks is None else blocks.order,
        slots if blocks is None else blocks.table,
        slots if sources is None else sources,
        num_slots,
        pairs.num_blocks,
        slots.stride(0),
        *numbers,
        TOP_K=slots.shape[1],
        HAS_BIAS=biases is not None,
        IS_SORTED=blocks is not None,
        HAS_SOURCES=sources is not None,
        PER_ROW=pairs.per_row,
        CODES="" if form is None else form.codes,
        HAS_FLOAT8=has_float8(weights.device),
        HAS_E8M0=form is not None and form.scales == "e8m0",
        HAS_ZEROS=matrices.zeros is not None,
        ZERO_BITS=0 if form is None else form.zero_bits,
        GROUP=(form and form.group) or matrices.width,
        DEPTH=matrices.width,
        WIDTH=width,
        HEIGHT=pairs.height,
        ROWS=rows,
        STEP=step,
        num_warps=tile.warps,
        num_stages=_num_stages(tile, step, matrices, pairs.height, rows_read),
        **more,
    )
    return out


@partial(jit, any_alignment=["biases", "scales", "zeros", "slots", "order", "table", "sources"])
def _gate_up(
    inputs: tl.pointer_type,
    weights: tl.pointer_type,
    biases: tl.pointer_type,
    scales: tl.pointer_type,
    zeros: tl.pointer_type,
    out: tl.pointer_type,
    slots: tl.pointer_type,
    order: tl.pointer_type,
    table: tl.pointer_type,
    sources: tl.pointer_type,
    num_slots: tl.tensor,
    num_blocks: tl.tensor,
    slots_stride: tl.tensor,
    alpha: tl.tensor,
    limit: tl.tensor,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_SORTED: tl.constexpr,
    HAS_SOURCES: tl.constexpr,
    PER_ROW: tl.constexpr,
    CODES: tl.constexpr,
    HAS_FLOAT8: tl.constexpr,
    HAS_E8M0: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    ZERO_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> None:
    """A program: the pairs of a block x ``ROWS`` of the gate and of up."""
    tiles: tl.constexpr = (WIDTH + ROWS - 1) // ROWS
    block = tl.program_id(0) // tiles
    slot = _slot_of(block, slots, table, num_slots, slots_stride, TOP_K, IS_SORTED)
    if slot < 0:
        return
    pairs, has_pair = _pairs_of(block, order, table, num_blocks, IS_SORTED, HEIGHT)
    rows = _sources_of(pairs, has_pair, sources, HAS_SOURCES, PER_ROW)
    columns = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    gate = slot.to(tl.int64) * (2 * WIDTH) + columns
    up = gate + WIDTH
    is_column = columns < WIDTH
    parts = weights, scales, zeros
    form: tl.constexpr = (CODES, HAS_FLOAT8, HAS_E8M0, HAS_ZEROS, ZERO_BITS)
    gates = tl.zeros([HEIGHT, ROWS], dtype=tl.float32)
    ups = tl.zeros([HEIGHT, ROWS], dtype=tl.float32)
    for start in range(0, DEPTH, STEP):
        place = start + tl.arange(0, STEP)
        x = _rows_tile(inputs, rows, has_pair, place, DEPTH, STEP)
        x = halves(x, CODES, HEIGHT, STEP)
        gates = add_product(gates, x, parts, gate, is_column, start, form, GROUP, DEPTH, STEP)
        ups = add_product(ups, x, parts, up, is_column, start, form, GROUP, DEPTH, STEP)
    dtype = out.dtype.element_ty
    if HAS_BIAS:
        own = biases + slot * (2 * WIDTH) + columns
        gates += tl.load(own, mask=is_column, other=0.0).to(tl.float32)[None, :]
        ups += tl.load(own + WIDTH, mask=is_column, other=0.0).to(tl.float32)[None, :]
    gates, ups = rounded(gates, dtype), rounded(ups, dtype)
    if ACTIVATION == "clamped_swiglu":
        gates = tl.where(gates > limit, limit, gates)  # NaN stays
        ups = tl.where(ups > limit, limit, tl.where(ups < -limit, -limit, ups))
        active = gates / (1.0 + tl.exp(-alpha * gates))
        ups = ups + 1.0
    else:
        active = _activated(gates, ACTIVATION)
    product = cast(rounded(active, dtype) * rounded(ups, dtype), dtype)
    _store(out, product, pairs, has_pair, columns, WIDTH)


@partial(jit, any_alignment=["biases", "scales", "zeros", "slots", "order", "table", "sources"])
def _multiply(
    inputs: tl.pointer_type,
    weights: tl.pointer_type,
    biases: tl.pointer_type,
    scales: tl.pointer_type,
    zeros: tl.pointer_type,
    out: tl.pointer_type,
    slots: tl.pointer_type,
    order: tl.pointer_type,
    table: tl.pointer_type,
    sources: tl.pointer_type,
    num_slots: tl.tensor,
    num_blocks: tl.tensor,
    slots_stride: tl.tensor,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_SORTED: tl.constexpr,
    HAS_SOURCES: tl.constexpr,
    PER_ROW: tl.constexpr,
    CODES: tl.constexpr,
    HAS_FLOAT8: tl.constexpr,
    HAS_E8M0: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    ZERO_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """A program: the pairs of a block x ``ROWS`` of their matrix."""
    tiles: tl.constexpr = (WIDTH + ROWS - 1) // ROWS
    block = tl.program_id(0) // tiles
    slot = _slot_of(block, slots, table, num_slots, slots_stride, TOP_K, IS_SORTED)
    if slot < 0:
        return
    pairs, has_pair = _pairs_of(block, order, table, num_blocks, IS_SORTED, HEIGHT)
    rows = _sources_of(pairs, has_pair, sources, HAS_SOURCES, PER_ROW)
    columns = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    row = slot.to(tl.int64) * WIDTH + columns
    is_column = columns < WIDTH
    parts = weights, scales, zeros
    form: tl.constexpr = (CODES, HAS_FLOAT8, HAS_E8M0, HAS_ZEROS, ZERO_BITS)
    total = tl.zeros([HEIGHT, ROWS], dtype=tl.float32)
    for start in range(0, DEPTH, STEP):
        place = start + tl.arange(0, STEP)
        x = _rows_tile(inputs, rows, has_pair, place, DEPTH, STEP)
        x = halves(x, CODES, HEIGHT, STEP)
        total = add_product(total, x, parts, row, is_column, start, form, GROUP, DEPTH, STEP)
    if HAS_BIAS:
        own = biases + slot * WIDTH + columns
        total += tl.load(own, mask=is_column, other=0.0).to(tl.float32)[None, :]
    _store(out, cast(total, out.dtype.element_ty), pairs, has_pair, columns, WIDTH)


@jit
def _slot_of(
    block: tl.tensor,
    slots: tl.pointer_type,
    table: tl.pointer_type,
    num_slots: tl.tensor,
    slots_stride: tl.tensor,
    TOP_K: tl.constexpr,
    IS_SORTED: tl.constexpr,
) -> tl.tensor:
    """The slot of a block; negative: there is nothing to do."""
    if IS_SORTED:
        slot = tl.load(table + block)
    else:
        slot = tl.load(slots + (block // TOP_K) * slots_stride + block % TOP_K).to(tl.int32)
        slot = tl.where(slot < num_slots, slot, -1)
    return slot


@jit
def _pairs_of(
    block: tl.tensor,
    order: tl.pointer_type,
    table: tl.pointer_type,
    num_blocks: tl.tensor,
    IS_SORTED: tl.constexpr,
    HEIGHT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The pairs [HEIGHT] of a block, and which of them there are."""
    places = tl.arange(0, HEIGHT)
    if IS_SORTED:
        first = tl.load(table + num_blocks + block)
        has_pair = places < tl.load(table + 2 * num_blocks + block)
        pairs = tl.load(order + first + places, mask=has_pair, other=0)
    else:
        has_pair = places == 0
        pairs = places * 0 + block
    return pairs, has_pair


@jit
def _sources_of(
    pairs: tl.tensor,
    has_pair: tl.tensor,
    sources: tl.pointer_type,
    HAS_SOURCES: tl.constexpr,
    PER_ROW: tl.constexpr,
) -> tl.tensor:
    """Input rows of pairs."""
    rows = pairs // PER_ROW
    if HAS_SOURCES:
        rows = tl.load(sources + pairs, mask=has_pair, other=0)
    return rows


@jit
def _rows_tile(
    inputs: tl.pointer_type,
    rows: tl.tensor,
    has_row: tl.tensor,
    place: tl.tensor,
    DEPTH: tl.constexpr,
    STEP: tl.constexpr,
) -> tl.tensor:
    """[HEIGHT, STEP] of the input rows."""
    address = inputs + rows.to(tl.int64)[:, None] * DEPTH + place[None, :]
    mask = has_row[:, None]
    if DEPTH % STEP != 0:
        mask = mask & (place < DEPTH)[None, :]
    return tl.load(address, mask=mask, other=0.0)


@jit
def _activated(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """An activation in float32."""
    if ACTIVATION == "silu":
        active = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        active = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_pytorch_tanh":
        # (1 + tanh(z)) / 2 is a sigmoid of 2 z.
        active = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        tl.static_assert(ACTIVATION == "relu")
        active = tl.where(x < 0.0, 0.0, x)  # NaN stays
    return active


@jit
def _store(
    out: tl.pointer_type,
    values: tl.tensor,
    pairs: tl.tensor,
    has_pair: tl.tensor,
    columns: tl.tensor,
    WIDTH: tl.constexpr,
) -> None:
    address = out + pairs.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    tl.store(address, values, mask=has_pair[:, None] & (columns < WIDTH)[None, :])


@partial(jit, any_alignment=["slots", "weights"])
def _sum_rows(
    outputs: tl.pointer_type,
    slots: tl.pointer_type,
    weights: tl.pointer_type,
    out: tl.pointer_type,
    slots_stride: tl.tensor,
    weights_stride: tl.tensor,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    ROUNDS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """A program: ``TILE`` elements of a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE], dtype=tl.float32)
    for place in range(TOP_K):
        if tl.load(slots + row * slots_stride + place) >= 0:
            address = outputs + (row * TOP_K + place) * WIDTH + columns
            x = tl.load(address, mask=columns < WIDTH, other=0.0).to(tl.float32)
            factor = tl.load(weights + row * weights_stride + place)
            if ROUNDS:
                dtype = outputs.dtype.element_ty
                total += rounded(x * rounded(factor, dtype), dtype)
            else:
                total += x * factor
    tl.store(out + row * WIDTH + columns, cast(total, out.dtype.element_ty), mask=columns < WIDTH)
