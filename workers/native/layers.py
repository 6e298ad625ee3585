"""Layers one after the other in one call (``c/layers.c``).

Reference: the same layers by ``half.run_half`` and ``experts.expert_rows``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from workers.native.exchange import UNEXPECTED
from workers.native.experts import CallFields
from workers.native.half import BatchFields, HalfFields
from workers.native.team import Team, check

NO_BANK = -1
"""Of a layer without routed experts."""


class LayerFields(ctypes.Structure):
    """``struct layer``."""

    _fields_ = (
        ("half", HalfFields),
        ("cache", ctypes.c_void_p),
        ("bank", ctypes.c_int64),
        ("experts", CallFields),
        ("mlp", CallFields),
        ("home", ctypes.c_void_p),
    )


class LayersRowsFields(ctypes.Structure):
    """``struct layers_rows``."""

    _fields_ = (
        ("hidden", ctypes.c_void_p),
        ("normed", ctypes.c_void_p),
        ("others", ctypes.c_void_p),
        ("topk_ids", ctypes.c_void_p),
        ("topk_weights", ctypes.c_void_p),
        ("routed", ctypes.c_void_p),
    )


def run_layers(
    team: Team,
    layers: ctypes.Array[LayerFields],
    batch: BatchFields,
    rows: LayersRowsFields,
    advance: Callable[[], None],
    advance_s: float,
) -> tuple[int, int]:
    """Run layers; ``advance`` is called after the layer in which ``advance_s`` are over.

    The layers that are done, all of them or up to that in whose exchange with other ranks native
    code has stopped, and why: 0, ``UNSENT`` or ``UNEXPECTED`` (see ``workers.native.exchange``).
    Raises ``IndexError`` for an empty expert slot, ``RuntimeError`` where there is no memory.
    """
    run, done, result = team.library.functions.layers_run, ctypes.c_int64(), 0
    fixed = [ctypes.byref(fields) for fields in (batch, rows)]
    while done.value < len(layers) and not result:
        result = run(team.pointer, layers, len(layers), *fixed, advance_s, ctypes.byref(done))
        if result < UNEXPECTED:
            check(result)
        advance()
    return done.value, result
