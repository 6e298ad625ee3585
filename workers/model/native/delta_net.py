"""Gated DeltaNet with a native kernel, row by row."""

from __future__ import annotations

from torch import Tensor

from workers.model.attention_batch import StateRows
from workers.model.delta_net import DeltaNet
from workers.native.delta_net import DeltaNetFields, run_delta_net
from workers.native.panels import DTYPES
from workers.native.thread_team import ThreadTeam


class NativeDeltaNet:
    """Gated DeltaNet of one layer as one native call; implements ``Mix``. The bits of a row depend
    on its sequence alone."""

    def __init__(self, team: ThreadTeam, net: DeltaNet) -> None:
        spec = net.spec
        assert all(t.is_contiguous() for t in (net.conv, net.rate, net.bias, net.norm))
        self._team, self._net = team, net
        self._fields = DeltaNetFields(
            dtype=DTYPES.index(net.norm.dtype),
            num_key_heads=spec.num_key_heads,
            num_value_heads=spec.num_value_heads,
            key_dim=spec.key_dim,
            value_dim=spec.value_dim,
            kernel=spec.kernel,
            eps=net.eps,
            conv=net.conv.data_ptr(),
            rate=net.rate.data_ptr(),
            bias=net.bias.data_ptr(),
            norm=net.norm.data_ptr(),
        )

    def __call__(self, rows: Tensor, cache: Tensor, states: StateRows) -> Tensor:
        """Compute Gated DeltaNet of projected rows [T, row_width]: [T, V * D]; see ``Mix``."""
        spec = self._net.spec
        out = rows.new_empty(len(rows), spec.num_value_heads * spec.value_dim)
        run_delta_net(self._team, self._fields, rows, out, cache, states.places, states.chains)
        return out
