"""All layers of a step, with embedding, final norm and head, in one native call (``c/layers.c``).

Reference: the same layers by ``attention_sublayer.run_sublayer`` and ``experts.expert_rows``, then
``norm.norm_rows`` and ``matrix.Matrix.multiply``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from workers.native.attention_sublayer import SublayerFields
from workers.native.exchange import UNEXPECTED
from workers.native.experts import CallFields
from workers.native.matrix import MatrixFields
from workers.native.structs import c_struct
from workers.native.thread_team import ThreadTeam, check

NO_BANK = -1
"""Value of a layer's bank index if the layer has no routed experts."""


@c_struct("layers.c", "layer", sublayer=SublayerFields, mlp=CallFields)
class LayerFields(ctypes.Structure):
    """C ``struct layer``: attention sublayer and MLP of one layer."""


@c_struct("layers.c", "stack", layers=ctypes.POINTER(LayerFields), head=MatrixFields)
class StackFields(ctypes.Structure):
    """C ``struct stack``: all layers of a model, with embedding, final norm and head."""


@c_struct("layers.c", "layer_ends")
class LayerEnds(ctypes.Structure):
    """C ``struct layer_ends``: monotonic time in nanoseconds at which each part of a layer ended; 0
    for a part that has not ended."""


@c_struct("layers.c", "flow")
class FlowFields(ctypes.Structure):
    """C ``struct flow``: a micro-batch and its progress through the layers."""


def run_layers(
    team: ThreadTeam,
    stack: StackFields,
    flows: ctypes.Array[FlowFields],
    advance: Callable[[], None],
    advance_s: float,
) -> tuple[int, int]:
    """Run all layers, with embedding, final norm and head, for all flows (micro-batches).

    ``advance`` is called after a layer whenever ``advance_s`` have elapsed, and before the return.
    Returns a result and the index of the flow that is next. The result is 0 if all flows are done;
    it is ``UNSENT`` or ``UNEXPECTED`` if native code stopped in an exchange with other ranks
    (``workers.native.exchange``), and Python must continue with the next flow. Raises
    ``IndexError`` for an empty expert slot or a token without an embedding, and ``RuntimeError`` if
    memory is exhausted or another thread uses the team.
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
