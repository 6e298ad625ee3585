"""Gated DeltaNet on a CPU (``c/delta_net.c``). Reference: ``workers.model.delta_net``."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from workers.native.panels import DTYPES
from workers.native.structs import c_struct
from workers.native.thread_team import ThreadTeam, check


@c_struct("delta_net.h", "delta_net")
class DeltaNetFields(ctypes.Structure):
    """C ``struct delta_net``: weights of one Gated DeltaNet layer."""

    @property
    def conv_width(self) -> int:
        """Number of channels of the layer's convolution."""
        return int(2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim)

    @property
    def row_width(self) -> int:
        """Number of elements of a row after the layer's input projections."""
        return self.conv_width + int(self.num_value_heads * (self.value_dim + 2))

    @property
    def state_width(self) -> int:
        """Number of float32 values in the recurrent state of one sequence, in this layer."""
        matrices = self.num_value_heads * self.key_dim * self.value_dim
        return int((self.kernel - 1) * self.conv_width + matrices)


@c_struct("delta_net.h", "delta_rows")
class DeltaRowsFields(ctypes.Structure):
    """C ``struct delta_rows``: inputs and outputs of one call of a Gated DeltaNet layer."""


def run_delta_net(
    team: ThreadTeam,
    net: DeltaNetFields,
    rows: Tensor,
    out: Tensor,
    states: Tensor,
    runs: Tensor,
    chains: Tensor,
) -> None:
    """Run a Gated DeltaNet layer: ``out`` [T, V * D] from rows [T, row_width]; updates ``states``
    in place.

    V is the number of value heads, D their width. ``runs`` [runs, 4] and ``chains``
    [sequences + 1], int64: which states each run of rows reads and writes, and the first run of
    each sequence (see ``StateRows``).
    """
    dtype = DTYPES[net.dtype]
    _check(rows, dtype, net.row_width)
    _check(out, dtype, net.num_value_heads * net.value_dim)
    _check(states, torch.float32, net.state_width)
    _check(runs, torch.int64, 4)
    assert len(out) == len(rows), f"{len(out)} outputs of {len(rows)} rows"
    assert chains.dtype == torch.int64, f"{chains.dtype} chains"
    assert chains.is_contiguous()
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


def _check(found: Tensor, dtype: torch.dtype, width: int) -> None:
    """Assert that a tensor is contiguous, [.., width] and of ``dtype``; C cannot check this."""
    assert found.dtype == dtype, f"{found.dtype} where {dtype} is read"
    assert found.shape[1] == width, f"{found.shape[1]} columns where {width} are read"
    assert found.is_contiguous()
