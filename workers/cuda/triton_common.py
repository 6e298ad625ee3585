"""What all kernels share: how they are declared, and products of tiles.

A kernel's parameters are the addresses of tensors (``tl.pointer_type``; callers give the tensors),
numbers, and numbers that are compiled in (``tl.constexpr``). What it computes with are tiles
(``tl.tensor``): blocks of numbers in registers, whose sides are powers of two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Triton's interpreter runs the kernels, which cannot multiply bfloat16."""
LOG2_E = tl.constexpr(1.4426950408889634)
"""Exponentials of base 2 are what GPUs have."""
MIN_DOT = 16
"""Least side of a tile that tensor cores multiply."""


def jit(function: Callable[..., Any], any_alignment: Sequence[str] = ()) -> Any:
    """``triton.jit`` for type checkers: a kernel is launched as ``kernel[grid](..)``.

    Numbers have no forms of their own for 1 and multiples of 16, nor do the addresses named by
    ``any_alignment``: else serving might meet a form that must be compiled within a step.
    """
    kinds = function.__annotations__  # strings
    numbers = [name for name, kind in kinds.items() if kind == "tl.tensor" and name != "return"]
    return triton.jit(
        function, do_not_specialize=numbers, do_not_specialize_on_alignment=list(any_alignment)
    )


def power_of_two(number: int) -> int:
    """The next one from ``number`` on: 1 -> 1, 5 -> 8."""
    return 1 << max(number - 1, 0).bit_length()


@jit
def dot(a: tl.tensor, b: tl.tensor, total: tl.tensor) -> tl.tensor:
    """total [m, n] float32 + a [m, k] @ b [k, n]; float32 operands are not rounded to tf32."""
    if INTERPRETED:  # it takes bfloat16 for integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@jit
def cast(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """float32 x, rounded to the nearest of a type."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter would cut bits off
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@jit
def rounded(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """x in float32, after rounding to a type."""
    return cast(x, dtype).to(tl.float32)
