"""The attention side of an exchange in two native calls, as long as all goes as expected.

``RemoteDispatcher`` is the reference, and goes on where native code stops. Native are steps in
which every expert rank gets every row, over sockets, for models in a type that the kernels have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.dispatch.native_parts import Memory, exchange_fields
from workers.model.config import BankSpec
from workers.model.layers import Dispatch
from workers.native.exchange import (
    UNEXPECTED,
    UNSENT,
    HomeFields,
    dispatch_rows,
    gather_outputs,
)
from workers.native.panels import DTYPES
from workers.native.team import Team
from workers.transport.direct import DirectEdges


@dataclass(frozen=True, slots=True)
class NativeRows:
    """Rows that native code has sent to all ranks."""

    fields: HomeFields
    names: Tensor
    """[ranks, T, k or 2k] int32: slots on each rank, -1: not there, with weights behind them;
    overwritten by the next dispatch of the micro-batch."""
    weights: Tensor
    """[T, k]; ``fields`` points to it."""
    shape: tuple[int, ...]
    """Of the outputs."""

    @property
    def slots(self) -> Tensor:
        """[ranks, T, k]."""
        return self.names[:, :, : self.weights.shape[1]]


class NativeHome:
    """Dispatches and gathers the rows of one attention rank. Data thread only."""

    def __init__(self, team: Team, dtype: torch.dtype) -> None:
        self._team = team
        self._dtype = dtype
        self._direct: DirectEdges | None = None
        self._fields: dict[tuple[int, int, int], HomeFields] = {}
        self._sent: dict[int, Tensor] = {}
        self._received = Memory()

    def begin_step(self, direct: DirectEdges | None) -> None:
        """Use these edges in the step that begins; None: native code has no part in it."""
        if direct is not self._direct:
            self._fields.clear()
        self._direct = direct

    def dispatch(
        self, bank: BankSpec, sent: Dispatch, slots: Tensor, micro_batch: int, by_pair: bool
    ) -> NativeRows | None:
        """Send the rows of a micro-batch, all that were granted; None: they were not sent.

        slots [ranks, experts] int32, -1: not there. Raises as ``DataTransport.post``.
        """
        direct = self._direct
        if direct is None or not direct.are_clear():
            return None
        ids, weights = sent.topk_ids.contiguous(), sent.topk_weights.contiguous()
        inputs = sent.rows.contiguous()
        assert ids.dtype == torch.int64
        assert inputs.dtype == self._dtype
        num_rows, top_k = ids.shape
        home = self._home(bank, sent.exchange, micro_batch, by_pair)
        num_ranks, home.num_experts = slots.shape
        names = self._names(num_ranks, num_rows, top_k if by_pair else 2 * top_k, micro_batch)
        home.slots, home.ids, home.weights = slots.data_ptr(), ids.data_ptr(), weights.data_ptr()
        home.num_rows, home.weights_dtype = num_rows, DTYPES.index(weights.dtype)
        home.inputs, home.sent = inputs.data_ptr(), names.data_ptr()
        if dispatch_rows(self._team.library, home) == UNSENT:
            direct.keep_unsent()
        else:
            direct.sent()
        width = bank.exchanges[sent.exchange].out_width
        shape = (num_rows, width) if home.is_weighted else (num_rows, top_k, width)
        return NativeRows(home, names, weights, shape)

    def prepare(
        self,
        banks: Sequence[BankSpec],
        slots: Sequence[Tensor],
        num_rows: Sequence[int],
        by_pair: bool,
    ) -> list[list[HomeFields]] | None:
        """For native layers: the first exchange of each bank, by micro-batch of so many rows, all
        that were granted; None: native code has no part in the step.

        All banks have the same top-k. Raises as ``DataTransport.post``.
        """
        direct = self._direct
        if direct is None or not direct.are_clear():
            return None
        num_ranks, (top_k,) = slots[0].shape[0], {bank.top_k for bank in banks}
        found = []
        for micro_batch, count in enumerate(num_rows):
            homes = [self._home(bank, 0, micro_batch, by_pair) for bank in banks]
            names = self._names(num_ranks, count, top_k if by_pair else 2 * top_k, micro_batch)
            for home, table in zip(homes, slots, strict=True):
                home.slots, home.num_experts = table.data_ptr(), table.shape[1]
                home.sent = names.data_ptr()
            found.append(homes)
        most = max(num_rows)  # outputs are added up before others are received
        received = self._received.of(
            max(self._num_received(home, num_ranks, most, top_k) for home in found[0])
        )
        for homes in found:
            for home in homes:
                home.received = received
        direct.sent()  # so that their paths are watched from now on
        return found

    def stopped(self, result: int) -> None:
        """Native layers have stopped. Raises ``PeerLostError``."""
        assert self._direct is not None
        if result == UNSENT:
            self._direct.keep_unsent()
        else:
            self._direct.give_back()

    def waiting(self, bank: BankSpec, micro_batch: int, weights: Tensor) -> NativeRows:
        """Rows that native layers have sent before they stopped; weights [T, k]."""
        home, names = self._fields[bank.index, 0, micro_batch], self._sent[micro_batch]
        shape = (len(weights), bank.exchanges[0].out_width)
        return NativeRows(home, names, weights, shape)

    def gather(self, rows: NativeRows) -> Tensor | None:
        """The outputs of dispatched rows; None: they are still to be received.

        Raises as ``DataTransport.receive``.
        """
        direct, home = self._direct, rows.fields
        if direct is None or not direct.are_clear():
            return None
        num_bytes = self._num_received(home, len(rows.names), *rows.weights.shape)
        home.received = self._received.of(num_bytes)
        out = torch.empty(rows.shape, dtype=self._dtype)
        home.out = out.data_ptr()
        if gather_outputs(self._team.library, home) == UNEXPECTED:
            direct.give_back()
            return None
        return out

    def _home(self, bank: BankSpec, exchange: int, micro_batch: int, by_pair: bool) -> HomeFields:
        key = bank.index, exchange, micro_batch
        home = self._fields.get(key)
        if home is None:
            assert self._direct is not None
            home = self._fields[key] = HomeFields(
                exchange=exchange_fields(self._direct, bank, exchange, micro_batch, self._dtype),
                is_weighted=bank.exchanges[exchange].weighted,
                rounds_products=not bank.float32_weights,
            )
        home.exchange.by_pair = by_pair
        return home

    def _num_received(self, home: HomeFields, num_ranks: int, num_rows: int, top_k: int) -> int:
        """Bytes of the outputs of all ranks."""
        exchange = home.exchange
        row_bytes = top_k * self._dtype.itemsize if exchange.by_pair else num_ranks * 4
        return int(num_rows * exchange.out_width * row_bytes)

    def _names(self, num_ranks: int, num_rows: int, width: int, micro_batch: int) -> Tensor:
        """Memory for what the rows of a micro-batch name, [ranks, T, width] int32."""
        names = self._sent.get(micro_batch)
        if names is None or names.shape != (num_ranks, num_rows, width):
            names = torch.empty(num_ranks, num_rows, width, dtype=torch.int32)
            self._sent[micro_batch] = names
        return names
