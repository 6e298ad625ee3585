"""Attention sublayer of a layer on a CPU (``c/attention_sublayer.h``).

Reference: ``workers.model.attention_sublayer``.
"""

from __future__ import annotations

import ctypes

from workers.native.matrix import MatrixFields
from workers.native.structs import c_struct
from workers.native.thread_team import ThreadTeam, check

SCORINGS = ("softmax", "softmax_of_best", "sigmoid", "float32_softmax")
"""Names of ``enum scoring``, by value."""
NO_NORM, NORM_HEADS, NORM_WIDTH = range(3)
"""Values of ``enum qk_norm``."""
E4M3 = 2
"""Value of ``enum dtype`` for 8-bit caches."""
ENTER, ATTEND, LEAVE = 1, 2, 4
"""Values of ``enum stage``."""
NO_WINDOW = 1 << 40
"""Window size of layers without a sliding window."""


@c_struct("routing.h", "routing")
class RoutingFields(ctypes.Structure):
    """``struct routing``: parameters of a router's choice."""


@c_struct("attention_sublayer.h", "router", matrix=MatrixFields, routing=RoutingFields)
class RouterFields(ctypes.Structure):
    """``struct router``: a router."""


@c_struct(
    "attention_sublayer.h",
    "sublayer",
    qkv=MatrixFields,
    output=MatrixFields,
    query_router=RouterFields,
    router=RouterFields,
)
class SublayerFields(ctypes.Structure):
    """``struct sublayer``: weights and parameters of a layer's sublayer."""


@c_struct("attention_sublayer.h", "sublayer_batch")
class BatchFields(ctypes.Structure):
    """``struct sublayer_batch``: rows of a micro-batch, for all layers."""


@c_struct("attention_sublayer.h", "sublayer_rows")
class RowsFields(ctypes.Structure):
    """``struct sublayer_rows``: inputs and outputs of a layer."""


def run_sublayer(
    team: ThreadTeam, sublayer: SublayerFields, batch: BatchFields, rows: RowsFields, stages: int
) -> None:
    """Compute the given stages. Raises ``RuntimeError`` if memory is exhausted."""
    run = team.library.functions.sublayer_run
    check(run(team.pointer, *map(ctypes.byref, (sublayer, batch, rows)), stages))
