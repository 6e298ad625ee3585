"""Expert kernels: each program multiplies a block of pairs (input row, expert slot) by a tile of
their slot's weights.

With few rows, the time of a product is the time to read the weights, so a block may have few rows.
With many rows, blocks are as high as tensor cores can use. The output of each pair is written to
memory, so the sum over a row's pairs has a fixed order. Reference: ``workers.experts.kernels_cpu``
and ``workers.model.weighting``. As in the reference, these values are rounded: gate and up, their
product, the output of a pair and, if requested, the product of output and router weight. Biases are
added before rounding; a clamped SwiGLU is rounded only at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.cuda.align import Blocks, align
from workers.cuda.expert_tiles import TALLEST_BLOCK, num_stages, tile_of
from workers.cuda.triton_common import MIN_DOT, cast, jit, rounded
from workers.cuda.weight_tiles import add_product, halves
from workers.quantization.formats import WeightFormat

Activation = Literal["silu", "gelu", "gelu_pytorch_tanh", "relu"]

_UNSORTED_PAIRS = 32
"""Maximum number of (input row, expert slot) pairs for which each pair is a separate block. The
launch of the sorting kernel costs more than it saves, because 32 pairs of 64 slots use 26 different
slots on average, and the L2 cache holds the weights of slots that several pairs use."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs (input row, expert slot) for an expert kernel. Pair p is the p-th element of
    ``slots``."""

    slots: Tensor
    """Expert slots of each row, [T, k] integers, -1 for none; each row is contiguous."""
    blocks: Blocks | None
    """The pairs sorted by slot, in blocks; None if each pair is a separate block."""
    sources: Tensor | None
    """Input row of each pair, [T * k] int64; None: pair p has input row p // ``per_row``."""
    per_row: int
    """Number of consecutive pairs that share an input row, if ``sources`` is None."""

    @property
    def num_blocks(self) -> int:
        return self.slots.numel() if self.blocks is None else self.blocks.num_blocks

    @property
    def height(self) -> int:
        """Number of rows in a tile: the pairs of a block, padded to at least ``MIN_DOT``."""
        return MIN_DOT if self.blocks is None else max(self.blocks.height, MIN_DOT)

    def of_outputs(self) -> Pairs:
        """Return the same pairs for the next product, in which the input row of pair p is row p,
        the output of pair p."""
        return replace(self, sources=None, per_row=1)


def make_pairs(
    slots: Tensor, num_slots: int, sources: Tensor | None, per_row: int, dtype: torch.dtype
) -> Pairs:
    """Return ``Pairs`` for products with ``num_slots`` matrices, sorted by slot if there are more
    than 32.

    ``sources`` [T * k]: the input row of each pair; None: pair p has input row p // ``per_row``.
    """
    if slots.numel() <= _UNSORTED_PAIRS:
        return Pairs(slots, None, sources, per_row)
    height = MIN_DOT
    while height < TALLEST_BLOCK[dtype.itemsize] and slots.numel() > height * num_slots:
        height *= 2
    return Pairs(slots, align(slots, num_slots, height), sources, per_row)


@dataclass(frozen=True, slots=True)
class Matrices:
    """Matrices of an expert kernel, one for each slot, unquantized or quantized
    (``workers.quantization``)."""

    weights: Tensor
    """Weights [slots, out, in], or quantized values [slots, out, bytes] uint8."""
    width: int
    """Number of columns of a matrix (in)."""
    form: WeightFormat | None = None
    """Format of quantized weights; None if the weights are not quantized."""
    scales: Tensor | None = None
    """Scales [slots, out, groups] of quantized weights; None if the weights are not quantized."""
    zeros: Tensor | None = None
    """Zero points [slots, out, groups] int8 of quantized weights; None if the format has none."""

    @classmethod
    def of(cls, parts: Sequence[Tensor], form: WeightFormat | None, width: int) -> Matrices:
        """Make matrices from tensors: weights alone, or quantized values, scales and any zero
        points."""
        return cls(parts[0], width, form, *parts[1:])


@dataclass(frozen=True, slots=True)
class GateActivation:
    """Activation of a gated expert: a function of gate and up."""

    name: Activation | Literal["clamped_swiglu"]
    alpha: float = 1.0
    limit: float = 0.0
    """Limit of gate and up in ``clamped_swiglu``, which is gate * sigmoid(alpha * gate) * (up +
    1)."""


def gate_up(
    inputs: Tensor,
    weights: Matrices,
    biases: Tensor | None,
    pairs: Pairs,
    activation: GateActivation,
) -> Tensor:
    """Compute activation(gate x) * up x for each pair.

    inputs [N, in], weights [slots, 2 * inner, in] with the gate's rows first, biases [slots, 2 *
    inner, 1]. Returns [P, inner], undefined for pairs without a slot. All tensors are contiguous,
    in float32, float16 or bfloat16, to which dequantized weights are rounded, too.
    """
    return _launch(inputs, weights, biases, pairs, activation)


def multiply(inputs: Tensor, weights: Matrices, biases: Tensor | None, pairs: Pairs) -> Tensor:
    """Multiply the input row of each pair by the matrix of the pair's slot.

    inputs [N, in], weights [slots, out, in], biases [slots, out, 1] or None -> [P, out].
    """
    return _launch(inputs, weights, biases, pairs, None)


def has_float8(device: torch.device) -> bool:
    """Whether a device converts float8 numbers in hardware: Ada, Hopper and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _launch(
    inputs: Tensor,
    matrices: Matrices,
    biases: Tensor | None,
    pairs: Pairs,
    activation: GateActivation | None,
) -> Tensor:
    weights, form = matrices.weights, matrices.form
    assert form is not None or inputs.dtype == weights.dtype
    assert inputs.is_contiguous()
    tile = tile_of(pairs.height, inputs.itemsize, form)
    step, width = tile.row_bytes // inputs.itemsize, weights.shape[1]
    rows = rows_read = tile.rows
    if activation is not None:
        width, rows, rows_read = width // 2, tile.gate_rows, 2 * tile.gate_rows
    num_slots = weights.shape[0]
    slots, blocks, sources = pairs.slots, pairs.blocks, pairs.sources
    out = inputs.new_empty(slots.numel(), width)
    _multiply[(pairs.num_blocks * triton.cdiv(width, rows),)](
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
        1.0 if activation is None else activation.alpha,
        0.0 if activation is None else activation.limit,
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
        ACTIVATION="" if activation is None else activation.name,
        num_warps=tile.warps,
        num_stages=num_stages(
            tile, step, pairs.height, rows_read, matrices.width, form, weights.device
        ),
    )
    return out


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
    """Multiply a block of pairs by ``ROWS`` rows of their slot's matrix in each program; with an
    activation, by ``ROWS`` rows of gate and of up."""
    IS_GATED: tl.constexpr = ACTIVATION != ""
    tiles: tl.constexpr = (WIDTH + ROWS - 1) // ROWS
    block = tl.program_id(0) // tiles
    slot = _slot_of(block, slots, table, num_slots, slots_stride, TOP_K, IS_SORTED)
    if slot < 0:
        return
    pairs, has_pair = _pairs_of(block, order, table, num_blocks, IS_SORTED, HEIGHT)
    rows = _sources_of(pairs, has_pair, sources, HAS_SOURCES, PER_ROW)
    columns = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    row = slot.to(tl.int64) * (2 * WIDTH if IS_GATED else WIDTH) + columns
    up = row + WIDTH
    is_column = columns < WIDTH
    parts = weights, scales, zeros
    form: tl.constexpr = (CODES, HAS_FLOAT8, HAS_E8M0, HAS_ZEROS, ZERO_BITS)
    total = tl.zeros([HEIGHT, ROWS], dtype=tl.float32)
    ups = total
    for start in range(0, DEPTH, STEP):
        place = start + tl.arange(0, STEP)
        x = _rows_tile(inputs, rows, has_pair, place, DEPTH, STEP)
        x = halves(x, CODES, HEIGHT, STEP)
        total = add_product(total, x, parts, row, is_column, start, form, GROUP, DEPTH, STEP)
        if IS_GATED:
            ups = add_product(ups, x, parts, up, is_column, start, form, GROUP, DEPTH, STEP)
    if HAS_BIAS:
        own = biases + slot * (2 * WIDTH if IS_GATED else WIDTH) + columns
        total += tl.load(own, mask=is_column, other=0.0).to(tl.float32)[None, :]
        if IS_GATED:
            ups += tl.load(own + WIDTH, mask=is_column, other=0.0).to(tl.float32)[None, :]
    dtype = out.dtype.element_ty
    if IS_GATED:
        gates, ups = rounded(total, dtype), rounded(ups, dtype)
        if ACTIVATION == "clamped_swiglu":
            gates = tl.where(gates > limit, limit, gates)  # NaN stays
            ups = tl.where(ups > limit, limit, tl.where(ups < -limit, -limit, ups))
            active = gates / (1.0 + tl.exp(-alpha * gates))
            ups = ups + 1.0
        else:
            active = _activated(gates, ACTIVATION)
        total = rounded(active, dtype) * rounded(ups, dtype)
    _store(out, cast(total, dtype), pairs, has_pair, columns, WIDTH)


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
    """Return the expert slot of a block; negative if the block is unused."""
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
    """Return the pairs [HEIGHT] of a block, and a mask [HEIGHT] that is true for valid pairs."""
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
    """Return the input rows [HEIGHT] of pairs."""
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
    """Load columns ``place`` [STEP] of the input rows ``rows`` [HEIGHT]: [HEIGHT, STEP]."""
    address = inputs + rows.to(tl.int64)[:, None] * DEPTH + place[None, :]
    mask = has_row[:, None]
    if DEPTH % STEP != 0:
        mask = mask & (place < DEPTH)[None, :]
    return tl.load(address, mask=mask, other=0.0)


@jit
def _activated(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """Return the activation of x, computed in float32."""
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
