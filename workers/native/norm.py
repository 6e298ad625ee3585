"""RMS norm on a CPU (``c/norm.c``). Reference: ``layers.rms_norm``."""

from __future__ import annotations

from torch import Tensor

from workers.native.panels import DTYPES
from workers.native.thread_team import ThreadTeam


def norm_rows(team: ThreadTeam, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Apply RMS norm to contiguous rows x [rows, H] in place, and return x; weight [H] of the same
    dtype.

    The bits of a row do not depend on other rows or on the instruction set.
    """
    assert x.dtype in DTYPES, f"{x.dtype} rows"
    assert x.dtype == weight.dtype, f"{weight.dtype} weight"
    assert x.shape[1:] == weight.shape, f"rows of shape {tuple(x.shape)}"
    assert x.is_contiguous()
    assert weight.is_contiguous()
    run = team.library.functions.norm_rows
    run(x.data_ptr(), weight.data_ptr(), *x.shape, eps, DTYPES.index(x.dtype), None)
    return x
