"""The expert side of a step in one native call, as long as all goes as expected.

``ExpertServer`` is the reference, and serves the exchange before which native code stops.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.dispatch.native_parts import Memory, exchange_fields
from workers.model.config import BankSpec
from workers.native.exchange import UNEXPECTED, UNSENT, ServerFields, memory_bytes, serve_exchanges
from workers.native.experts import NativeSlots
from workers.transport.direct import DirectEdges


@dataclass(frozen=True, slots=True)
class NativeExchange:
    """One exchange of a step."""

    bank: BankSpec
    exchange: int
    micro_batch: int
    experts: NativeSlots
    filled: Tensor
    """[slots] bool: the slot has an expert in this epoch."""
    counts: Tensor
    """[slots or more] int64: the computed pairs are added."""
    by_pair: bool
    """An output of each pair returns, in place of a sum of each row."""


class NativeServer:
    """Serves the exchanges of one expert rank. Data thread only."""

    def __init__(self, dtype: torch.dtype, progress: ctypes.c_int64) -> None:
        """``progress`` grows with every exchange."""
        self._dtype = dtype
        self._progress = progress
        self._direct: DirectEdges | None = None
        self._rows: list[ctypes.Array[ctypes.c_int64]] = []
        self._known: dict[tuple[int, int, int], ServerFields] = {}
        self._exchanges: Sequence[NativeExchange] = ()
        self._memory = Memory()
        self.fields: list[ServerFields] = []
        """Of each exchange of the step, with the results of those that were served."""

    def begin_step(
        self,
        direct: DirectEdges | None,
        rows: Sequence[Sequence[int]],
        exchanges: Sequence[NativeExchange],
    ) -> None:
        """Prepare the exchanges of a step, in their order, over these edges.

        ``rows``: of each micro-batch, by edge.
        """
        if direct is not self._direct:
            self._known.clear()
        self._direct, self._exchanges = direct, exchanges
        self._rows = [(ctypes.c_int64 * len(counts))(*counts) for counts in rows]
        self.fields = [] if direct is None else [self._prepare(direct, x) for x in exchanges]
        self._servers = (ctypes.c_void_p * len(self.fields))(*map(ctypes.addressof, self.fields))
        if self.fields:
            library = exchanges[0].experts.team.library
            memory = self._memory.of(max(memory_bytes(library, f) for f in self.fields))
            for fields in self.fields:
                fields.memory = memory

    def serve(self, first: int) -> int:
        """Serve exchanges from the first one on; returns the next one, which Python is to serve.

        Raises as ``DataTransport.receive`` and ``post``.
        """
        direct = self._direct
        if direct is None or first == len(self.fields) or not direct.are_clear():
            return first
        library = self._exchanges[first].experts.team.library
        count, result = serve_exchanges(library, self._servers, first)
        if result == UNSENT:
            direct.keep_unsent()
        elif count:
            direct.sent()
        if result == UNEXPECTED:  # last, as it may lose an edge on which outputs were sent
            direct.give_back()
        return first + count

    def _prepare(self, direct: DirectEdges, exchange: NativeExchange) -> ServerFields:
        bank, filled, counts = exchange.bank, exchange.filled, exchange.counts
        assert filled.dtype == torch.bool
        assert len(counts) >= len(filled)
        key = bank.index, exchange.exchange, exchange.micro_batch
        fields = self._known.get(key)
        if fields is None:
            common = exchange_fields(direct, bank, *key[1:], self._dtype)
            fields = self._known[key] = ServerFields(exchange=common)
        fields.exchange.by_pair = exchange.by_pair
        fields.team = exchange.experts.team.pointer
        fields.experts = exchange.experts.table.fields
        fields.experts.rounds_products = not bank.float32_weights
        fields.filled, fields.num_filled = filled.data_ptr(), len(filled)
        fields.counts = counts.data_ptr()
        fields.progress = ctypes.addressof(self._progress)
        fields.rows = ctypes.addressof(self._rows[exchange.micro_batch])
        return fields
