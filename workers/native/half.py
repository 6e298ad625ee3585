"""The attention half of a layer on a CPU (``c/half.h``).

Reference: ``workers.model.half``.
"""

from __future__ import annotations

import ctypes

from workers.native.matrix import MatrixFields
from workers.native.team import Team, check

SCORINGS = ("softmax", "softmax_of_best", "sigmoid", "float32_softmax")
"""By ``enum scoring``."""
NO_NORM, NORM_HEADS, NORM_WIDTH = range(3)
"""``enum qk_norm``."""
E4M3 = 2
"""``enum dtype`` of caches in 8 bits."""
ENTER, ATTEND, LEAVE = 1, 2, 4
"""``enum stage``."""
NO_WINDOW = 1 << 40
"""Positions of a window that is none."""


class RoutingFields(ctypes.Structure):
    """``struct routing``."""

    _fields_ = (
        ("num_experts", ctypes.c_int32),
        ("top_k", ctypes.c_int32),
        ("scoring", ctypes.c_int32),
        ("is_normed", ctypes.c_int32),
        ("float32_product", ctypes.c_int32),
        ("num_groups", ctypes.c_int32),
        ("top_groups", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("least_sum", ctypes.c_float),
        ("correction", ctypes.c_void_p),
    )


class RouterFields(ctypes.Structure):
    """``struct router``."""

    _fields_ = (("matrix", MatrixFields), ("routing", RoutingFields))


class HalfFields(ctypes.Structure):
    """``struct half``."""

    _fields_ = (
        ("dtype", ctypes.c_int64),
        ("hidden_size", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("qk_norm", ctypes.c_int64),
        ("latent_rank", ctypes.c_int64),
        ("eps", ctypes.c_double),
        ("scale", ctypes.c_double),
        ("clip", ctypes.c_double),
        ("sinks", ctypes.c_void_p),
        ("norm1", ctypes.c_void_p),
        ("norm2", ctypes.c_void_p),
        ("qk_norm_weights", ctypes.c_void_p),
        ("qkv", MatrixFields),
        ("output", MatrixFields),
        ("query_router", RouterFields),
        ("router", RouterFields),
    )


class BatchFields(ctypes.Structure):
    """``struct half_batch``."""

    _fields_ = (
        ("num_rows", ctypes.c_int64),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("wave_stride", ctypes.c_int64),
        ("waves_by_position", ctypes.c_int64),
        ("chunks", ctypes.c_void_p),
        ("num_chunks", ctypes.c_int64),
        ("max_length", ctypes.c_int64),
        ("num_blocks", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("cache_dtype", ctypes.c_int64),
    )


class RowsFields(ctypes.Structure):
    """``struct half_rows``."""

    _fields_ = (
        ("hidden", ctypes.c_void_p),
        ("cache", ctypes.c_void_p),
        ("normed", ctypes.c_void_p),
        ("projected", ctypes.c_void_p),
        ("queries", ctypes.c_void_p),
        ("attended", ctypes.c_void_p),
        ("mixed", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("topk_ids", ctypes.c_void_p),
        ("topk_weights", ctypes.c_void_p),
    )


def run_half(
    team: Team, half: HalfFields, batch: BatchFields, rows: RowsFields, stages: int
) -> None:
    """Compute some stages. Raises ``RuntimeError`` where there is no memory."""
    run = team.library.functions.half_run
    check(run(team.pointer, *map(ctypes.byref, (half, batch, rows)), stages))
