"""Dequantization of 8-bit and 4-bit weights. Reference: ``workers.quantization.matrix``.

A byte holds the 4-bit values of two neighbouring columns. They become two tiles, one of the even
and one of the odd columns. Each tile is multiplied by the matching columns of the input rows, so
the two tiles need not be interleaved.
"""

from __future__ import annotations

import triton.language as tl

from workers.cuda.triton_common import jit

PRODUCT = tl.constexpr("""{
    .reg .b32 zero;
    mov.b32 zero, 0x80008000;
    fma.rn.bf16x2 $0, $1, $2, zero;
}""")
INT4 = tl.constexpr("""{
    .reg .b32 first, second, one, minus;
    prmt.b32 first, $4, 0, 0x4140;
    prmt.b32 second, $4, 0, 0x4342;
    mov.b32 one, 0x3F803F80;
    mov.b32 minus, 0xC308C308;
    lop3.b32 $0, first, 0x000F000F, 0x43084308, 0x6A;
    lop3.b32 $1, second, 0x000F000F, 0x43084308, 0x6A;
    shr.b32 first, first, 4;
    shr.b32 second, second, 4;
    lop3.b32 $2, first, 0x000F000F, 0x43084308, 0x6A;
    lop3.b32 $3, second, 0x000F000F, 0x43084308, 0x6A;
    fma.rn.bf16x2 $0, $0, one, minus;
    fma.rn.bf16x2 $1, $1, one, minus;
    fma.rn.bf16x2 $2, $2, one, minus;
    fma.rn.bf16x2 $3, $3, one, minus;
}""")
"""PTX that converts signed 4-bit values to bfloat16: it puts (value & 15) ^ 8 into the low bits of
128.0, which gives the value + 136, and subtracts 136."""
E2M1 = tl.constexpr("""{
    .reg .b32 first, second, sign, whole, zero;
    prmt.b32 first, $4, 0, 0x4140;
    prmt.b32 second, $4, 0, 0x4342;
    mov.b32 whole, 0x7E807E80;
    mov.b32 zero, 0x80008000;
    shl.b32 sign, first, 12;
    and.b32 sign, sign, 0x80008000;
    shl.b32 $0, first, 6;
    lop3.b32 $0, $0, 0x01C001C0, sign, 0xEA;
    shl.b32 sign, second, 12;
    and.b32 sign, sign, 0x80008000;
    shl.b32 $1, second, 6;
    lop3.b32 $1, $1, 0x01C001C0, sign, 0xEA;
    shl.b32 sign, first, 8;
    and.b32 sign, sign, 0x80008000;
    shl.b32 $2, first, 2;
    lop3.b32 $2, $2, 0x01C001C0, sign, 0xEA;
    shl.b32 sign, second, 8;
    and.b32 sign, sign, 0x80008000;
    shl.b32 $3, second, 2;
    lop3.b32 $3, $3, 0x01C001C0, sign, 0xEA;
    fma.rn.bf16x2 $0, $0, whole, zero;
    fma.rn.bf16x2 $1, $1, whole, zero;
    fma.rn.bf16x2 $2, $2, whole, zero;
    fma.rn.bf16x2 $3, $3, whole, zero;
}""")
"""PTX that converts e2m1 values to bfloat16: it moves sign, exponent and mantissa to their
positions in bfloat16, and multiplies by 2**126."""


@jit
def decode_8bit(codes: tl.tensor, CODES: tl.constexpr, HAS_FLOAT8: tl.constexpr) -> tl.tensor:
    """Convert 8-bit quantized values (uint8) to float32, without scale.

    ``HAS_FLOAT8``: the device converts float8 in hardware. If it does not, the result for e4m3
    lacks a power of two, by which ``decode_scale`` multiplies the scale.
    """
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
def decode_4bit(codes: tl.tensor, CODES: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Convert the lower and the upper 4-bit values of bytes (uint8) to two float32 tiles, without
    scale. The results lack a power of two, by which ``decode_scale`` multiplies the scale."""
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
def decode_scale(scale: tl.tensor, CODES: tl.constexpr) -> tl.tensor:
    """Return a scale in float32, times the power of two that ``decode_8bit`` and ``decode_4bit``
    omit. To avoid an overflow, scales of e2m1 must be below 2**114."""
    if CODES == "int4":
        scale = scale * 0.0625
    elif CODES == "e2m1":
        scale = scale * 16384.0
    elif CODES == "e4m3":
        scale = scale * 256.0
    return scale


@jit
def decode_zero_point(zero: tl.tensor, CODES: tl.constexpr) -> tl.tensor:
    """Convert a zero point to the same power of two as the results of ``decode_4bit``."""
    return zero * 16.0 if CODES == "int4" else zero


@jit
def decode_4bit_bfloat16(codes: tl.tensor, CODES: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Convert the lower and the upper 4-bit values of bytes to two tiles of exact bfloat16, four
    bytes at a time. Only for GPUs, not for Triton's interpreter.

    A small integer in the low bits of 128.0 gives 128 plus the integer. For e2m1 see ``_of_half``.
    """
    if CODES == "int4":
        low, high = tl.inline_asm_elementwise(
            INT4, "=r,=r,=r,=r,r", [codes], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        tl.static_assert(CODES == "e2m1")
        low, high = tl.inline_asm_elementwise(
            E2M1, "=r,=r,=r,=r,r", [codes], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    return low, high


@jit
def bfloat16_products(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """Return x * y for bfloat16 tiles, rounded once, two elements at a time. Only for GPUs, not for
    Triton's interpreter."""
    return tl.inline_asm_elementwise(PRODUCT, "=r,r,r", [x, y], tl.bfloat16, is_pure=True, pack=2)


@jit
def power_of(scale: tl.tensor) -> tl.tensor:
    """Return E8M0 scales as float32: 2**(value - 127); 255 is NaN."""
    code = scale.to(tl.int32)
    bits = tl.where(code == 0, 0x00400000, code << 23)
    bits = tl.where(code == 255, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True)


@jit
def _of_half(bits: tl.tensor) -> tl.tensor:
    """Return the float32 of a float16 with the given bits.

    Callers put a smaller float type into the upper bits, exponent next to mantissa. The result is
    the smaller float, even if subnormal, times a power of two, because the exponent biases differ.
    """
    return bits.to(tl.float16, bitcast=True).to(tl.float32)
