"""Products of input rows by tiles of expert weights, quantized or not.

A kernel processes the columns in steps. If a group (columns with one scale) is a whole number of
steps, or a step is a whole number of groups, each scale is read once per step.
"""

from __future__ import annotations

import triton.language as tl

from workers.cuda.codes import (
    bfloat16_products,
    decode_4bit,
    decode_4bit_bfloat16,
    decode_8bit,
    decode_scale,
    decode_zero_point,
    power_of,
)
from workers.cuda.triton_common import INTERPRETED, cast, dot, jit


@jit
def halves(
    x: tl.tensor, CODES: tl.constexpr, HEIGHT: tl.constexpr, STEP: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return two tiles of input rows x [HEIGHT, STEP]: for 4-bit weights the even and the odd
    columns, otherwise all columns twice."""
    if CODES == "int4" or CODES == "e2m1":
        even, odd = tl.split(x.reshape(HEIGHT, STEP // 2, 2))
        found = (even, odd)
    else:
        found = (x, x)
    return found


@jit
def add_product(
    total: tl.tensor,
    x: tl.tuple,
    parts: tl.tuple,
    rows: tl.tensor,
    is_row: tl.tensor,
    start: tl.tensor,
    form: tl.constexpr,
    GROUP: tl.constexpr,
    DEPTH: tl.constexpr,
    STEP: tl.constexpr,
) -> tl.tensor:
    """Return ``total`` plus the product of input rows and ``STEP`` columns of expert weights, from
    column ``start``.

    ``x``: input rows as two tiles (``halves``). ``rows`` [ROWS]: weight rows, numbered over all
    slots. ``parts``: addresses of the weights or quantized values, of the scales and of the zero
    points.
    """
    CODES: tl.constexpr = form[0]
    dtype: tl.constexpr = x[0].dtype
    weights = parts[0]
    if CODES == "":
        place = start + tl.arange(0, STEP)
        mask = _mask(place, is_row, DEPTH, STEP)
        found = tl.load(weights + rows[None, :] * DEPTH + place[:, None], mask=mask, other=0.0)
        total = dot(x[0], found, total)
    elif CODES == "int8" or CODES == "e4m3":
        place = start + tl.arange(0, STEP)
        mask = _mask(place, is_row, DEPTH, STEP)
        codes = tl.load(weights + rows[None, :] * DEPTH + place[:, None], mask=mask, other=0)
        numbers = decode_8bit(codes, CODES, form[1])
        scale, zero = _scales(parts, rows, is_row, start, form, GROUP, DEPTH, STEP, STEP)
        if not form[1]:
            scale = decode_scale(scale, CODES)
        total = dot(x[0], cast(_scaled(numbers, scale, zero, form[3]), dtype), total)
    else:
        row_bytes: tl.constexpr = (DEPTH + 1) // 2
        place = start // 2 + tl.arange(0, STEP // 2)
        mask = _mask(place, is_row, row_bytes, STEP // 2)
        codes = tl.load(weights + rows[None, :] * row_bytes + place[:, None], mask=mask, other=0)
        scale, zero = _scales(parts, rows, is_row, start, form, GROUP, DEPTH, STEP, STEP // 2)
        is_short: tl.constexpr = form[2] or parts[1].dtype.element_ty == tl.bfloat16
        if is_short and not form[3] and dtype == tl.bfloat16 and not INTERPRETED:
            low, high = decode_4bit_bfloat16(codes, CODES)
            scale = scale.to(tl.bfloat16)  # exact: a bfloat16 or a power of two
            low, high = _short_product(low, scale), _short_product(high, scale)
        else:
            low, high = decode_4bit(codes, CODES)
            scale, zero = decode_scale(scale, CODES), decode_zero_point(zero, CODES)
            low = cast(_scaled(low, scale, zero, form[3]), dtype)
            high = cast(_scaled(high, scale, zero, form[3]), dtype)
        total = dot(x[0], low, total)
        total = dot(x[1], high, total)
    return total


@jit
def _mask(
    place: tl.tensor, is_row: tl.tensor, DEPTH: tl.constexpr, STEP: tl.constexpr
) -> tl.tensor:
    """Return a mask of the valid columns [STEP] of rows [ROWS]: [STEP, ROWS], or [1, ROWS] if all
    columns are valid."""
    mask = is_row[None, :]
    if DEPTH % STEP != 0:
        mask = mask & (place < DEPTH)[:, None]
    return mask


@jit
def _scales(
    parts: tl.tuple,
    rows: tl.tensor,
    is_row: tl.tensor,
    start: tl.tensor,
    form: tl.constexpr,
    GROUP: tl.constexpr,
    DEPTH: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the scales and zero points of ``STEP`` columns in float32.

    The shape is [1, ROWS] if all columns are in one group, [groups, ROWS] if they are whole groups,
    and else [COLUMNS, ROWS], for each column (8 bits) or every second column (4 bits).
    """
    groups: tl.constexpr = (DEPTH + GROUP - 1) // GROUP
    if groups == 1 or GROUP % STEP == 0:
        at = rows[None, :] * groups + start // GROUP
        mask = is_row[None, :]
    else:
        if STEP % GROUP == 0:
            group = start // GROUP + tl.arange(0, STEP // GROUP)
        else:
            group = (start + tl.arange(0, COLUMNS) * (STEP // COLUMNS)) // GROUP
        at = rows[None, :] * groups + group[:, None]
        mask = is_row[None, :] & (group < groups)[:, None]
    scale = tl.load(parts[1] + at, mask=mask, other=0)
    scale = power_of(scale) if form[2] else scale.to(tl.float32)
    zero = scale
    if form[3]:
        zero = tl.load(parts[2] + at, mask=mask, other=0).to(tl.float32)
        zero *= 1.0 / (1 << form[4])
    return scale, zero


@jit
def _scaled(
    numbers: tl.tensor, scale: tl.tensor, zero: tl.tensor, HAS_ZEROS: tl.constexpr
) -> tl.tensor:
    """Return scale * (number - zero point) for quantized numbers [columns, ROWS]."""
    columns: tl.constexpr = numbers.shape[0]
    rows: tl.constexpr = numbers.shape[1]
    groups: tl.constexpr = scale.shape[0]
    if groups != 1 and groups != columns:
        numbers = numbers.reshape(groups, columns // groups, rows)
        scale, zero = scale[:, None, :], zero[:, None, :]
    if HAS_ZEROS:
        numbers -= zero
    numbers *= scale
    return numbers.reshape(columns, rows)


@jit
def _short_product(numbers: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Return scale * number for bfloat16 numbers [columns, ROWS] and bfloat16 scales, without zero
    points."""
    columns: tl.constexpr = numbers.shape[0]
    rows: tl.constexpr = numbers.shape[1]
    groups: tl.constexpr = scale.shape[0]
    if groups != 1 and groups != columns:
        numbers = numbers.reshape(groups, columns // groups, rows)
        scale = scale[:, None, :]
    return bfloat16_products(numbers, scale).reshape(columns, rows)
