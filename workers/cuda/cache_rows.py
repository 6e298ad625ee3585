"""Rows of the KV cache as kernels read and write them.

A row is the vector of one head and token. In an fp8 cache, it is a row of ``workers.model.fp8``:
``DIM`` values in e4m3, then their scale. ``ROW`` is the number of elements of a row, so
``ROW != DIM`` marks an fp8 cache. Reference: ``workers.model.fp8``, with the same bits.

Rows of an fp8 cache begin at any byte, and loads of single bytes need 37 instructions for an
element of a decode step's keys (sm_90, heads of 128 elements), aligned words of four bytes 12.
"""

from __future__ import annotations

import triton.language as tl

from workers.cuda.codes import power_of
from workers.cuda.triton_common import INTERPRETED, cast, jit

E4M3 = tl.constexpr("""{
    .reg .b32 word, sign, whole, zero;
    mov.b32 whole, 0x7B807B80;
    mov.b32 zero, 0x80008000;
    shf.r.wrap.b32 word, $2, $3, $4;
    prmt.b32 $0, word, 0, 0x1404;
    prmt.b32 word, word, 0, 0x3424;
    and.b32 sign, $0, 0x80008000;
    shr.b32 $0, $0, 4;
    lop3.b32 $0, $0, 0x07F007F0, sign, 0xEA;
    and.b32 sign, word, 0x80008000;
    shr.b32 word, word, 4;
    lop3.b32 word, word, 0x07F007F0, sign, 0xEA;
    fma.rn.bf16x2 $0, $0, whole, zero;
    fma.rn.bf16x2 word, word, whole, zero;
    fma.rn.bf16x2 $0, $0, $5, zero;
    fma.rn.bf16x2 $1, word, $5, zero;
}""")
"""PTX that converts four e4m3 values, which begin in the first of two words after a number of bits,
to two pairs of bfloat16: it moves sign, exponent and mantissa to their positions in bfloat16, and
multiplies by 2**120 and by a pair of equal scales."""


@jit
def load_rows(
    head: tl.tensor,
    slots: tl.tensor,
    positions: tl.tensor,
    has_row: tl.tensor,
    dtype: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
    DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    ROW: tl.constexpr,
) -> tl.tensor:
    """Load rows of a head as a tile [n, DIM_TILE] of ``dtype``, or [DIM_TILE, n] if
    ``IS_TRANSPOSED``. Rows for which ``has_row`` [n] is false are finite.

    ``head``: address of the head's row of slot 0. ``slots`` [n] int64: cache slots of the rows;
    ``positions`` [n]: positions in the sequence. For an fp8 cache, the block size is a multiple of
    4, and ``slots`` are valid also for rows that do not exist.
    """
    if ROW != DIM:
        found = _load_fp8(head, slots, positions, has_row, dtype, DIM, DIM_TILE)
        if IS_TRANSPOSED:
            found = tl.trans(found)
    else:
        places = tl.arange(0, DIM_TILE)
        if IS_TRANSPOSED:
            mask = has_row[None, :] & (places < DIM)[:, None]
            found = tl.load(head + slots[None, :] * DIM + places[:, None], mask=mask, other=0.0)
        else:
            mask = has_row[:, None] & (places < DIM)[None, :]
            found = tl.load(head + slots[:, None] * DIM + places[None, :], mask=mask, other=0.0)
    return found


@jit
def _load_fp8(
    head: tl.tensor,
    slots: tl.tensor,
    positions: tl.tensor,
    has_row: tl.tensor,
    dtype: tl.constexpr,
    DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
) -> tl.tensor:
    """Load and dequantize rows of an fp8 cache: [n, DIM_TILE]. Four values are in two words."""
    tl.static_assert(DIM % 4 == 0)
    # The start of the row, slots * (DIM + 1), modulo 4. A position is known before its slot.
    byte = (positions & 3).to(tl.uint32)
    words = (head + (slots * (DIM + 1) - byte)).to(tl.pointer_type(tl.uint32), bitcast=True)
    column, shift = tl.arange(0, DIM_TILE // 4)[None, :], byte * 8
    address = words[:, None] + column
    if DIM == DIM_TILE:
        low, high = tl.load(address), tl.load(address + 1)
    else:
        low = tl.load(address, mask=column < DIM // 4, other=0)
        high = tl.load(address + 1, mask=column < DIM // 4, other=0)
    scale = (tl.load(words + DIM // 4) >> shift) & 0xFF
    scale = tl.where(has_row, scale, 0)
    shift = shift[:, None]
    if dtype == tl.bfloat16 and not INTERPRETED:
        scales = tl.where(scale == 0xFF, 0x7FC07FC0, scale * 0x00800080)[:, None]
        first, second = tl.inline_asm_elementwise(
            E4M3,
            "=r,=r,r,r,r,r",
            [low, high, shift, scales],
            (tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
        even = tl.join(first.to(tl.uint16), second.to(tl.uint16))
        odd = tl.join((first >> 16).to(tl.uint16), (second >> 16).to(tl.uint16))
        bits = tl.join(even, odd).reshape(slots.shape[0], DIM_TILE)
        found = bits.to(tl.bfloat16, bitcast=True)
    else:
        codes = ((high.to(tl.uint64) << 32 | low) >> shift).to(tl.uint32)
        even = tl.join(codes << 24, codes << 8)  # each value in the upper byte
        odd = tl.join(codes << 16, codes)
        bits = tl.join(even, odd).reshape(slots.shape[0], DIM_TILE)
        bits = (bits & 0x80000000) | ((bits >> 4) & 0x07F00000)
        found = bits.to(tl.float32, bitcast=True) * 2.0**120 * power_of(scale)[:, None]
        found = cast(found, dtype)
    return found


@jit
def store_rows(
    rows: tl.tensor,
    x: tl.tensor,
    columns: tl.tensor,
    is_head: tl.tensor,
    DIM: tl.constexpr,
    ROW: tl.constexpr,
) -> None:
    """Store the vectors x [heads, DIM_TILE] float32, which are 0 from column ``DIM`` on, in cache
    rows.

    ``rows`` [heads, 1]: addresses of the rows; ``columns`` [1, DIM_TILE]; ``is_head`` [heads, 1]:
    whether to store a row. Source of the rounding to e4m3: PyTorch's ``c10::Float8_e4m3fn``.
    """
    is_there = is_head & (columns < DIM)
    if ROW == DIM:
        tl.store(rows + columns, x.to(rows.dtype.element_ty), mask=is_there)
    else:
        # As integers, NaN is the largest magnitude, then infinity.
        largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)[:, None]
        is_finite = largest < 0x7F800000
        scales = tl.maximum(((largest + 0x1FFFFF) >> 23) - 8, 1)
        scaled = x * ((254 - scales) << 23).to(tl.float32, bitcast=True)  # at most 448
        magnitude = tl.abs(scaled)
        bits = magnitude.to(tl.int32, bitcast=True)
        codes = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        # The sum rounds multiples of 2 ** -9, the subnormal numbers, to its last bits.
        subnormal = (magnitude + 16384.0).to(tl.int32, bitcast=True) & 0xF
        codes = tl.where(magnitude < 0.015625, subnormal, codes)
        codes = codes | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)
        codes = tl.where(is_finite, codes, 0x7F)
        tl.store(rows + columns, codes.to(tl.uint8), mask=is_there)
        tl.store(rows + DIM, tl.where(is_finite, scales, 0xFF).to(tl.uint8), mask=is_head)
