"""Numbers that codes of quantized weights stand for. Reference: ``workers.quantization.matrix``."""

from __future__ import annotations

import triton.language as tl

from workers.cuda.language import jit


@jit
def numbers_tile(
    codes: tl.pointer_type,
    rows: tl.tensor,
    place: tl.tensor,
    mask: tl.tensor,
    CODES: tl.constexpr,
    DEPTH: tl.constexpr,
) -> tl.tensor:
    """[STEP, ROWS] float32: of rows [ROWS] of codes the columns ``place`` [STEP]."""
    is_byte: tl.constexpr = CODES == "int8" or CODES == "e4m3"
    row_bytes: tl.constexpr = DEPTH if is_byte else (DEPTH + 1) // 2
    column = place if is_byte else place // 2
    address = codes + rows[None, :] * row_bytes + column[:, None]
    code = tl.load(address, mask=mask, other=0).to(tl.int32)
    if not is_byte:
        code = (code >> ((place & 1) * 4)[:, None]) & 15
    if CODES == "int8":
        found = ((code ^ 0x80) - 0x80).to(tl.float32)
    elif CODES == "int4":
        found = ((code ^ 8) - 8).to(tl.float32)
    elif CODES == "e4m3":
        found = _of_e4m3(code)
    else:
        tl.static_assert(CODES == "e2m1")
        found = _of_e2m1(code)
    return found


@jit
def power_of(scale: tl.tensor) -> tl.tensor:
    """2**(code - 127) of codes of E8M0; 255 is not a number."""
    code = scale.to(tl.int32)
    bits = tl.where(code == 0, 0x00400000, code << 23)
    bits = tl.where(code == 255, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True)


@jit
def _of_e4m3(byte: tl.tensor) -> tl.tensor:
    """A sign, 4 bits of exponent and 3 of mantissa, by whole numbers of 2**-9."""
    exponent = (byte >> 3) & 15
    size = tl.where(exponent == 0, byte & 7, ((byte & 7) | 8) << tl.maximum(exponent - 1, 0))
    size = size.to(tl.float32) * 0.001953125
    return tl.where((byte & 0x80) != 0, -size, size)


@jit
def _of_e2m1(code: tl.tensor) -> tl.tensor:
    """A sign, 2 bits of exponent and 1 of mantissa, by halves."""
    exponent = (code >> 1) & 3
    size = tl.where(exponent == 0, code & 1, ((code & 1) | 2) << tl.maximum(exponent - 1, 0))
    size = size.to(tl.float32) * 0.5
    return tl.where((code & 8) != 0, -size, size)
