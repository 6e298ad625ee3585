"""The attention half of a layer on a CPU (``c/half.h``).

Reference: ``workers.model.half``.
"""

from __future__ import annotations

import ctypes

from workers.native.matrix import MatrixFields
from workers.native.structure import fields
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

    _fields_ = fields(
        "int32: num_experts top_k scoring is_normed float32_product num_groups top_groups",
        "float: scale least_sum",
        "pointer: correction",
    )


class RouterFields(ctypes.Structure):
    """``struct router``."""

    _fields_ = (("matrix", MatrixFields), ("routing", RoutingFields))


class HalfFields(ctypes.Structure):
    """``struct half``."""

    _fields_ = fields(
        "int64: dtype hidden_size num_heads num_kv_heads head_dim window qk_norm latent_rank",
        "double: eps scale clip",
        "pointer: sinks norm1 norm2 qk_norm_weights",
        ("qkv", MatrixFields),
        ("output", MatrixFields),
        ("query_router", RouterFields),
        ("router", RouterFields),
    )


class BatchFields(ctypes.Structure):
    """``struct half_batch``."""

    _fields_ = fields(
        "int64: num_rows",
        "pointer: cos sin",
        "int64: wave_stride waves_by_position",
        "pointer: chunks",
        "int64: num_chunks max_length num_blocks block_size cache_dtype",
    )


class RowsFields(ctypes.Structure):
    """``struct half_rows``."""

    _fields_ = fields(
        "pointer: hidden cache normed projected queries attended mixed logits topk_ids",
        "pointer: topk_weights",
    )


def run_half(
    team: Team, half: HalfFields, batch: BatchFields, rows: RowsFields, stages: int
) -> None:
    """Compute some stages. Raises ``RuntimeError`` where there is no memory."""
    run = team.library.functions.half_run
    check(run(team.pointer, *map(ctypes.byref, (half, batch, rows)), stages))
