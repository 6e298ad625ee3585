"""Finds the best token of each row of logits, and rows with NaN or infinity.

On a CPU the bits of the logits are compared as integers, without a float32 copy. The bits of
positive floats have the order of the floats. Infinity and NaN have the largest bits of either sign.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bits = NDArray[np.signedinteger[Any]]
_INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
"""Signed integer dtype of the same size as each float dtype of logits."""
_INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F80_0000}
"""Bits of plus infinity in each dtype of logits; the bits of a positive NaN are greater."""
_UNSIGNED = {2: np.uint16, 4: np.uint32}
"""Unsigned numpy integer type by size in bytes."""


def best_tokens(logits: Tensor) -> Tensor:
    """Return the token with the highest logit in each row of logits [rows, V]: [rows] int64.

    If several tokens have the highest logit, the lowest id is returned. The token of a row with NaN
    is arbitrary.
    """
    if logits.device.type != "cpu":
        return logits.argmax(-1)
    return torch.from_numpy(_best(logits, _bits(logits))[0])


def finite_rows(logits: Tensor) -> Tensor:
    """Return whether each row of logits [rows, V] has neither NaN nor infinity: [rows] bool."""
    if logits.device.type != "cpu":
        # A sum is finite only if all its terms are; large sums do not overflow float32.
        return torch.isfinite(logits.sum(-1, dtype=torch.float32))
    bits = _bits(logits)
    return torch.from_numpy(_is_finite(bits, bits.max(-1), _INFINITY[logits.dtype]))


def best_of_finite(logits: Tensor) -> Tensor:
    """Return the token with the highest logit in each row: [rows] int64; -1 for rows with NaN or
    infinity."""
    if logits.device.type != "cpu":
        return torch.where(finite_rows(logits), best_tokens(logits), -1)
    bits = _bits(logits)
    tokens, largest = _best(logits, bits)
    tokens[~_is_finite(bits, largest, _INFINITY[logits.dtype])] = -1
    return torch.from_numpy(tokens)


def _best(logits: Tensor, bits: Bits) -> tuple[NDArray[np.int64], Bits]:
    """Return the best token of each row, and the largest bits (as signed integers) of each row."""
    tokens = bits.argmax(-1)
    largest: Bits = bits[np.arange(len(bits)), tokens]
    for row in (largest <= 0).nonzero()[0]:  # negative floats have the opposite order
        tokens[row] = logits[int(row)].float().numpy().argmax()
    return tokens, largest


def _is_finite(bits: Bits, largest: Bits, infinity: int) -> NDArray[np.bool_]:
    """Return whether each row of ``bits`` [rows, V] has neither NaN nor infinity.

    ``largest``: the largest bits of each row; ``infinity``: the bits of plus infinity.
    """
    unsigned = bits.view(_UNSIGNED[bits.itemsize])  # negative floats are greater than the others
    sign = 1 << (8 * bits.itemsize - 1)
    is_finite: NDArray[np.bool_] = (largest < infinity) & (unsigned.max(-1) < sign + infinity)
    return is_finite


def _bits(logits: Tensor) -> Bits:
    """View or copy logits [rows, V] as signed integers with the same bits."""
    bits: Bits = logits.contiguous().view(_INTEGERS[logits.dtype]).numpy()
    return bits
