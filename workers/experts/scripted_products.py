"""TorchScript loop over the products of many experts, in one call without the GIL.

Two compute threads that call single operators compete for the GIL, and the waiting thread sleeps:
at 40 microseconds a product, two threads were hardly faster than one. TorchScript runs a whole loop
without the GIL. A decode step of 8 layers of 64 experts (512 x 256, bfloat16, top-8), two cores of
an AMD EPYC, torch 2.13, went from 13.6 to 12.1 ms with 1 row, 37 to 33 with 8 and 72 to 64 with 32.

TorchScript is deprecated. If torch does not have it, the same functions run as Python.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from workers.model.torch_private import scriptable_packed_linear

F = TypeVar("F", bound=Callable[..., Tensor])


def _scripted(function: F) -> F:
    if not hasattr(torch.jit, "script"):
        return function
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script: F = torch.jit.script(function)
    return script


@_scripted
def expert_products(
    rows: Tensor, sizes: list[int], weights: list[Tensor], biases: list[Tensor], is_packed: bool
) -> Tensor:
    """Multiply the first ``sizes[0]`` of rows [R, in] by ``weights[0]``, and so on: [R, out].

    The weights are [out, in], or in oneDNN's layout if ``is_packed`` (see ``torch_private.pack``);
    biases are [out, 1], or the list is empty.
    """
    products: list[Tensor] = []
    for i, part in enumerate(torch.split(rows, sizes)):
        if is_packed:
            products.append(scriptable_packed_linear(part, weights[i]))
        else:
            products.append(functional.linear(part, weights[i]))
        if len(biases) > 0:
            products[i] = products[i] + biases[i].flatten()
    return products[0] if len(products) == 1 else torch.cat(products)
