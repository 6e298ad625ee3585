"""Numbers that codes of quantized weights stand for. Reference: ``workers.quantization.matrix``.

Codes of 4 bits come two in a byte, of neighbouring columns. They become two tiles, of the even and
of the odd columns, which are multiplied by such columns of the rows: nothing has to be put in order
between the two.
"""

from __future__ import annotations

import triton.language as tl

from workers.cuda.language import jit


@jit
def numbers_of(codes: tl.tensor, CODES: tl.constexpr, HAS_FLOAT8: tl.constexpr) -> tl.tensor:
    """Numbers of codes of 8 bits, uint8, in float32 and up to the factor of ``whole_scale``;
    ``HAS_FLOAT8``: the device converts such codes."""
    if CODES == "int8":
        found = codes.to(tl.int8, bitcast=True).to(tl.float32)
    else:
        tl.static_assert(CODES == "e4m3")
        if HAS_FLOAT8:
            found = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32)
        else:
            bits = codes.to(tl.uint16)
            found = _of_half(((bits & 0x80) << 8) | ((bits & 0x7F) << 7))
    return found


@jit
def halves_of(codes: tl.tensor, CODES: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Numbers of the lower and the upper halves of bytes, uint8, as ``numbers_of``."""
    if CODES == "int4":
        low = (codes << 4).to(tl.int8, bitcast=True).to(tl.float32)
        high = (codes & 0xF0).to(tl.int8, bitcast=True).to(tl.float32)
    else:
        tl.static_assert(CODES == "e2m1")
        bits = codes.to(tl.uint16)
        low = _of_half(((bits & 0x08) << 12) | ((bits & 0x07) << 9))
        high = _of_half(((bits & 0x80) << 8) | ((bits & 0x70) << 5))
    return low, high


@jit
def whole_scale(scale: tl.tensor, CODES: tl.constexpr, HAS_FLOAT8: tl.constexpr) -> tl.tensor:
    """``scale`` in float32, times what ``numbers_of`` and ``halves_of`` leave out: a power of two.
    So scales of e2m1 must be below 2**114."""
    if CODES == "int4":
        scale = scale * 0.0625
    elif CODES == "e2m1":
        scale = scale * 16384.0
    elif CODES == "e4m3" and not HAS_FLOAT8:
        scale = scale * 256.0
    return scale


@jit
def power_of(scale: tl.tensor) -> tl.tensor:
    """2**(code - 127) of codes of E8M0; 255 is not a number."""
    code = scale.to(tl.int32)
    bits = tl.where(code == 0, 0x00400000, code << 23)
    bits = tl.where(code == 255, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True)


@jit
def _of_half(bits: tl.tensor) -> tl.tensor:
    """float32 of float16's bits. A smaller float in its upper bits, exponent and mantissa side by
    side, is the same number but for a power of two, as the exponents count from elsewhere; so are
    those below the least exponent."""
    return bits.to(tl.float16, bitcast=True).to(tl.float32)
