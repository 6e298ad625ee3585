"""All layers of a step, and what stands around them, in one call (``c/layers.c``).

Reference: the same layers by ``half.run_half`` and ``experts.expert_rows``, then ``norm.norm_rows``
and ``matrix.Matrix.multiply``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from workers.native.exchange import UNEXPECTED
from workers.native.experts import CallFields
from workers.native.half import HalfFields
from workers.native.matrix import MatrixFields
from workers.native.team import Team, check

NO_BANK = -1
"""Of a layer without routed experts."""


class LayerFields(ctypes.Structure):
    """``struct layer``."""

    _fields_ = (
        ("half", HalfFields),
        ("cache", ctypes.c_void_p),
        ("bank", ctypes.c_int64),
        ("mlp", CallFields),
    )


class StackFields(ctypes.Structure):
    """``struct stack``."""

    _fields_ = (
        ("embedding", ctypes.c_void_p),
        ("vocab_size", ctypes.c_int64),
        ("layers", ctypes.POINTER(LayerFields)),
        ("num_layers", ctypes.c_int64),
        ("norm", ctypes.c_void_p),
        ("eps", ctypes.c_double),
        ("head", MatrixFields),
    )


class LayerEnds(ctypes.Structure):
    """``struct layer_ends``: monotonic nanoseconds, 0 for a part that has not ended."""

    _fields_ = (
        ("attention", ctypes.c_int64),
        ("dispatch", ctypes.c_int64),
        ("mlp", ctypes.c_int64),
        ("combine", ctypes.c_int64),
    )


class FlowFields(ctypes.Structure):
    """``struct flow``."""

    _fields_ = (
        ("batch", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("is_finite", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("normed", ctypes.c_void_p),
        ("others", ctypes.c_void_p),
        ("topk_ids", ctypes.c_void_p),
        ("topk_weights", ctypes.c_void_p),
        ("routed", ctypes.c_void_p),
        ("experts", ctypes.c_void_p),
        ("homes", ctypes.c_void_p),
        ("ends", ctypes.c_void_p),
        ("next", ctypes.c_int64),
        ("is_waiting", ctypes.c_int64),
        ("is_done", ctypes.c_int64),
    )


def run_layers(
    team: Team,
    stack: StackFields,
    flows: ctypes.Array[FlowFields],
    advance: Callable[[], None],
    advance_s: float,
) -> tuple[int, int]:
    """Run the layers of all flows, and what stands around them; ``advance`` is called after the
    layer in which ``advance_s`` are over.

    Where native code has stopped in an exchange with other ranks, why: ``UNSENT`` or ``UNEXPECTED``
    (see ``workers.native.exchange``), else 0; and the flow whose turn it is. Raises ``IndexError``
    for an empty expert slot or a token without an embedding, ``RuntimeError`` where there is no
    memory.
    """
    run, turn = team.library.functions.layers_run, ctypes.c_int64()
    arguments = (ctypes.byref(stack), flows, len(flows), advance_s, ctypes.byref(turn))
    while True:
        result = run(team.pointer, *arguments)
        if result < UNEXPECTED:
            check(result)
        advance()
        if result or all(flow.is_done for flow in flows):
            return result, turn.value
