"""Tests of batch invariance: whether a row's result depends on the other rows of its batch.

Matrix libraries select kernels by the number of rows, so a row's last bits depend on its batch. On
an AMD EPYC, torch 2.13, one thread, float32 products of 1 to 3 rows differ from products of 4 and
more, plain and batched; in oneDNN's packed layout only a single row does, and only for some shapes;
bfloat16 never. On an Intel Xeon with AMX, float32 products of some hundred inputs differ in both
layouts, unless their number of rows is fixed. Other processors may differ, so each worker tests its
own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cluster.core.errors import ConfigError

Agree = Callable[[Callable[[Tensor], Tensor], Tensor], bool]
"""Test of whether a function of rows is batch-invariant, called with the function and rows to use;
see ``rows_agree``."""
MAX_ROWS = 128
"""Maximum rows of a tested part of a batch; batch-invariant products never have more rows."""
NUM_TRIED_ROWS = MAX_ROWS + 12
_FEW = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17)
_MANY = (24, 31, 33, 48, 65, 96, 127, MAX_ROWS)
_PARTS = (*((first, n) for n in _FEW for first in (0, 3, 7)), *((5, n) for n in _MANY))
"""(first row, number of rows) of the parts whose results ``rows_agree`` compares with the results
of all rows."""


def rows_agree(function: Callable[[Tensor], Tensor], rows: Tensor) -> bool:
    """Return whether a function computes the same bits for a row in any batch.

    Compares ``function(rows)`` with ``function`` of several parts of ``rows`` [NUM_TRIED_ROWS,
    ...].
    """
    assert len(rows) == NUM_TRIED_ROWS
    whole = function(rows)
    parts = (slice(first, first + count) for first, count in _PARTS)
    return all(torch.equal(function(rows[part]), whole[part]) for part in parts)


def random_rows(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return normally distributed values [*shape] on the CPU, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(dtype)


def refusal(what: str) -> ConfigError:
    """Return the error for a machine on which ``what`` (as in "the norm") depends on the batch."""
    return ConfigError(
        "deterministic",
        True,
        f"is not possible on this machine: {what} of a row depends on the other rows",
    )
