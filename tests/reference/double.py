"""Float64 in place of float32, in code that names float32.

Models of transformers do so in norms, softmax, rotary positions and recurrent states.
"""

# mypy: ignore-errors

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode


class _Float64Mode(TorchFunctionMode):
    """Replaces float32 in each call to torch; says float64 for ``Tensor.float``."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(_widened(arg) for arg in args)
        return func(*args, **{name: _widened(arg) for name, arg in (kwargs or {}).items()})


def _widened(arg):
    return torch.float64 if arg is torch.float32 else arg


@contextmanager
def float32_as_float64():
    """Computes in float64 where the code in the block asks for float32 or for nothing."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64Mode():
            yield
    finally:
        torch.set_default_dtype(usual)
