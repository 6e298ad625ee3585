"""Gated DeltaNet on a CPU (``c/delta_net.c``). Reference: ``workers.model.delta_net``."""

from __future__ import annotations

import ctypes

from torch import Tensor

from workers.native.team import Team, check


class DeltaNetFields(ctypes.Structure):
    """``struct delta_net``."""

    _fields_ = (
        ("dtype", ctypes.c_int64),
        ("num_key_heads", ctypes.c_int64),
        ("num_value_heads", ctypes.c_int64),
        ("key_dim", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("kernel", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("conv", ctypes.c_void_p),
        ("rate", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
    )


class DeltaRowsFields(ctypes.Structure):
    """``struct delta_rows``."""

    _fields_ = (
        ("projected", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("states", ctypes.c_void_p),
        ("runs", ctypes.c_void_p),
        ("chains", ctypes.c_void_p),
        ("num_chains", ctypes.c_int64),
    )


def run_delta_net(
    team: Team,
    net: DeltaNetFields,
    rows: Tensor,
    out: Tensor,
    states: Tensor,
    runs: Tensor,
    chains: Tensor,
) -> None:
    """Contiguous rows [T, row_width] to ``out`` [T, V * D]; changes ``states``.

    ``runs`` and ``chains``: see ``StateRows``.
    """
    assert rows.is_contiguous()
    assert states.is_contiguous()
    fields = DeltaRowsFields(
        projected=rows.data_ptr(),
        out=out.data_ptr(),
        states=states.data_ptr(),
        runs=runs.data_ptr(),
        chains=chains.data_ptr(),
        num_chains=len(chains) - 1,
    )
    run = team.library.functions.delta_net_run
    check(run(team.pointer, ctypes.byref(net), ctypes.byref(fields)))
