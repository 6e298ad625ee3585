"""The best token of each row of logits, and whether all logits of a row are finite.

On a CPU the logits' bits are compared as integers, without a copy in float32: those of positive
floats have the order of the floats, and infinity and NaN are the largest of either sign.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
"""Signed integers of the same size."""
_INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F80_0000}
"""Bits of plus infinity; those of NaN are above."""


def best_tokens(logits: Tensor) -> Tensor:
    """[rows] int64: the best token of logits [rows, V], the lowest id of several.

    Any token for a row with NaN.
    """
    if logits.device.type != "cpu":
        return logits.argmax(-1)
    bits = _bits(logits)
    tokens = bits.argmax(-1)
    largest = np.take_along_axis(bits, tokens[:, None], -1).squeeze(-1)
    for row in np.flatnonzero(largest <= 0):  # negative floats have the opposite order
        tokens[row] = logits[int(row)].float().numpy().argmax()
    return torch.from_numpy(tokens)


def finite_rows(logits: Tensor) -> Tensor:
    """[rows] bool: no logit of [rows, V] is NaN or infinity."""
    if logits.device.type != "cpu":
        # A sum is finite only if all its terms are; float32 has room for large sums.
        return torch.isfinite(logits.sum(-1, dtype=torch.float32))
    bits, infinity = _bits(logits), _INFINITY[logits.dtype]
    unsigned = bits.view(np.dtype(f"u{bits.itemsize}"))  # negative numbers are above all positive
    sign = 1 << (8 * bits.itemsize - 1)
    is_finite = (bits.max(-1) < infinity) & (unsigned.max(-1) < sign + infinity)
    return torch.from_numpy(is_finite)


def _bits(logits: Tensor) -> NDArray[np.signedinteger]:
    """[rows, V] signed integers with the bits of the logits."""
    found: NDArray[np.signedinteger] = logits.contiguous().view(_INTEGERS[logits.dtype]).numpy()
    return found
