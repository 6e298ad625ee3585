"""Attention sublayer of a layer on a CPU (``c/attention_sublayer.h``).

Reference: ``workers.model.attention_sublayer``.
"""

from __future__ import annotations

import ctypes

from workers.native.matrix import MatrixFields
from workers.native.structs import c_struct
from workers.native.thread_team import ThreadTeam, check

SCORINGS = ("softmax", "softmax_of_best", "sigmoid", "float32_softmax")
"""Router scorings, in the order of the values of ``enum scoring`` in C."""
NO_NORM, NORM_HEADS, NORM_WIDTH = range(3)
"""Values of ``enum qk_norm`` in C: no norm of queries and keys, one per head, or one over all
heads."""
E4M3 = 2
"""Value of ``enum dtype`` in C for KV caches of 8-bit floats (e4m3)."""
ENTER, ATTEND, LEAVE = 1, 2, 4
"""Bits of ``enum stage`` in C: before attention, attention, and after attention."""
NO_WINDOW = 1 << 40
"""Sliding-window size that stands for no window: larger than every sequence."""


@c_struct("routing.h", "routing")
class RoutingFields(ctypes.Structure):
    """C ``struct routing``: parameters with which a router chooses experts."""


@c_struct("attention_sublayer.h", "router", matrix=MatrixFields, routing=RoutingFields)
class RouterFields(ctypes.Structure):
    """C ``struct router``: weight matrix and routing parameters of a router."""


@c_struct(
    "attention_sublayer.h",
    "sublayer",
    qkv=MatrixFields,
    output=MatrixFields,
    query_router=RouterFields,
    router=RouterFields,
)
class SublayerFields(ctypes.Structure):
    """C ``struct sublayer``: weights and parameters of a layer's attention sublayer."""


@c_struct("attention_sublayer.h", "sublayer_batch")
class BatchFields(ctypes.Structure):
    """C ``struct sublayer_batch``: rows of a micro-batch, for the attention sublayers of all
    layers."""


@c_struct("attention_sublayer.h", "sublayer_rows")
class RowsFields(ctypes.Structure):
    """C ``struct sublayer_rows``: inputs and outputs of the attention sublayer of one layer."""


def run_sublayer(
    team: ThreadTeam, sublayer: SublayerFields, batch: BatchFields, rows: RowsFields, stages: int
) -> None:
    """Compute stages of an attention sublayer. ``stages``: sum of ``ENTER``, ``ATTEND`` and
    ``LEAVE``.

    Raises ``RuntimeError`` if memory is exhausted or another thread uses the team.
    """
    run = team.library.functions.sublayer_run
    check(run(team.pointer, *map(ctypes.byref, (sublayer, batch, rows)), stages))
