"""Helpers shared by all Triton kernels: the ``jit`` wrapper and tile products.

Parameters of a kernel are addresses of tensors (``tl.pointer_type``; callers pass the tensors),
numbers, and compile-time constants (``tl.constexpr``). Kernels compute with tiles (``tl.tensor``):
blocks of numbers in registers, with sides that are powers of two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether Triton's interpreter runs the kernels. The interpreter cannot multiply bfloat16."""
LOG2_E = tl.constexpr(1.4426950408889634)
"""log2(e): factor that turns exponentials into powers of 2, which GPUs compute in hardware."""
MIN_DOT = 16
"""Smallest side of a tile that tensor cores multiply."""


def jit(function: Callable[..., Any], any_alignment: Sequence[str] = ()) -> Any:
    """Wrap ``triton.jit`` with a type that type checkers accept: a kernel is launched as
    ``kernel[grid](..)``.

    Triton does not specialize the kernel for integers of 1 or multiples of 16, nor for the
    alignment of addresses in ``any_alignment``. Otherwise a step could trigger a compilation.
    """
    kinds = function.__annotations__  # strings
    numbers = [name for name, kind in kinds.items() if kind == "tl.tensor" and name != "return"]
    return triton.jit(
        function, do_not_specialize=numbers, do_not_specialize_on_alignment=list(any_alignment)
    )


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least ``number``: 1 -> 1, 5 -> 8."""
    return 1 << max(number - 1, 0).bit_length()


@jit
def dot(a: tl.tensor, b: tl.tensor, total: tl.tensor) -> tl.tensor:
    """Return total [m, n] float32 + a [m, k] @ b [k, n]; float32 is not rounded to tf32."""
    if INTERPRETED:  # the interpreter treats bfloat16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@jit
def cast(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Round float32 x to the nearest value of a dtype, and return it in this dtype."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter would truncate
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@jit
def rounded(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Return x in float32, after rounding it to a dtype."""
    return cast(x, dtype).to(tl.float32)
