"""Sampling of tokens from logits on a CPU (``c/draw.c``). Reference: ``workers.sampling.draws``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.native.panels import DTYPES
from workers.native.thread_team import ThreadTeam, check

DRAW_ROW = np.dtype(
    [
        ("seed", np.uint64),
        ("choice", np.uint64),
        ("index", np.uint64),
        ("top_p", np.float64),
        ("scale", np.float32),
        ("floor", np.float32),
        ("top_k", np.int64),
    ]
)
"""Numpy dtype of C ``struct draw_row``: the sampling parameters of one row."""
NUM_DRAW_INTEGERS = DRAW_ROW.itemsize // 8
"""Number of 64-bit integers in the memory of a ``DRAW_ROW``."""


def can_draw(logits: Tensor) -> bool:
    """Whether the kernel supports the dtype and device of ``logits``."""
    return logits.device.type == "cpu" and logits.dtype in DTYPES


def draw_rows(team: ThreadTeam, logits: Tensor, rows: NDArray[Any], is_masked: bool) -> Tensor:
    """Sample a token for each row of logits [rows, V]; returns [rows] int64.

    ``rows``: sampling parameters by row, of dtype ``DRAW_ROW``. ``is_masked``: logits of minus
    infinity forbid their tokens. The result of a row is -1 if its logits are not finite, and -2 if
    all its tokens are forbidden.
    """
    assert can_draw(logits), f"{logits.dtype} logits"
    assert rows.dtype == DRAW_ROW, f"{rows.dtype} rows"
    assert rows.shape == logits.shape[:1], f"{rows.shape} rows of logits {tuple(logits.shape)}"
    logits, rows = logits.contiguous(), np.ascontiguousarray(rows)
    tokens = torch.empty(len(rows), dtype=torch.int64)
    if len(rows):
        result = team.library.functions.draw_rows(
            team.pointer,
            logits.data_ptr(),
            DTYPES.index(logits.dtype),
            logits.shape[1],
            len(rows),
            is_masked,
            rows.ctypes.data,
            tokens.data_ptr(),
        )
        check(result)
    return tokens
