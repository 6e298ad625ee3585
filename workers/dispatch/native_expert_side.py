"""Expert side of a step in one call of native (compiled C) code.

Native code serves a step over sockets if it can compute all banks. It stops before an exchange with
an unexpected message, and ``StaticServing``, the reference in Python, serves that exchange.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from workers.dispatch.expert_counters import ReceivedRows, UsedRows
from workers.dispatch.native_fields import GrowingBuffer, exchange_fields
from workers.dispatch.row_serving import ExpertSide, ServedPlace, ServedStep, StaticServing
from workers.native.exchange import UNEXPECTED, UNSENT, ServerFields, memory_bytes, serve_exchanges
from workers.native.experts import NativeSlots
from workers.transport.direct import DirectEdges
from workers.transport.transport import DataTransport


class NativeServing:
    """Serves the exchanges of one expert rank by native code if possible. Data thread only."""

    def __init__(
        self,
        side: ExpertSide,
        transport: DataTransport,
        static: StaticServing,
        *,
        yields: bool = False,
    ) -> None:
        """``yields``: whether the worker also serves other step groups."""
        self._side = side
        self._yields = yields
        self._transport = transport
        self._static = static
        self._step: ServedStep | None = None
        self._places: Sequence[ServedPlace] = ()
        self._direct: DirectEdges | None = None
        self._rows: list[ctypes.Array[ctypes.c_int64]] = []
        self._known: dict[tuple[int, int, int], ServerFields] = {}
        self._slots: list[NativeSlots] = []
        self._memory = GrowingBuffer()
        self._counters: Sequence[torch.Tensor] = ()
        """Counters to which native code adds in this step, also after a resize."""
        self.fields: list[ServerFields] = []
        """Parameters and results of each exchange of the current step, shared with native code;
        empty if native code cannot run the step."""
        self.only_one = False
        """Whether a call serves only one exchange."""

    @property
    def is_clear(self) -> bool:
        """Whether native code can serve the next exchange: no bytes wait on edges of the step."""
        return self._direct is not None and self._direct.are_clear()

    def begin_step(self, step: ServedStep, places: Sequence[ServedPlace]) -> None:
        """Begin a step. ``places``: all exchanges to serve, in order."""
        self._static.begin_step(step, places)
        self._step, self._places = step, places
        self._counters = self._side.counters.token_counts
        self._slots = slots = []
        for place in places:
            own = self._side.slots[place.bank.index].native(place.exchange)
            if own is None:
                break
            slots.append(own)
        ranks = tuple(step.granted[0])
        direct = self._transport.direct(ranks) if places and len(slots) == len(places) else None
        if direct is not self._direct:
            self._known.clear()
        self._direct = direct
        self.fields = []
        if direct is None:
            return
        rows = [[granted.get(rank, 0) for rank in ranks] for granted in step.granted]
        self._rows = [(ctypes.c_int64 * len(counts))(*counts) for counts in rows]
        self.fields = [
            self._prepare(direct, step, place, own)
            for place, own in zip(places, slots, strict=True)
        ]
        self._servers = (ctypes.c_void_p * len(self.fields))(*map(ctypes.addressof, self.fields))
        library = slots[0].team.library
        memory = self._memory.of(max(memory_bytes(library, f) for f in self.fields))
        for fields in self.fields:
            fields.memory = memory

    def serve(self, first: int) -> int:
        """Serve exchanges from index ``first`` on; return the index of the first unserved one.

        Native code serves as many as it can, then Python serves one. If this object ``yields``, the
        method only waits until another socket has data, and Python serves an exchange only if
        native code cannot begin it. Raises ``PeerLostError`` and
        ``GenerationChangedError``.
        """
        only_natively = self._yields and self.is_clear
        served = self.serve_natively(first)
        for place, fields in zip(self._places[first:served], self.fields[first:], strict=False):
            self._note(place, fields)
        if served == len(self._places) or only_natively:
            return served
        return self._static.serve(served)

    def serve_natively(self, first: int) -> int:
        """Serve exchanges from index ``first`` on; return the index that Python must serve next.

        The index is the number of exchanges if native code has served all. Raises the errors of
        ``DataTransport.receive`` and ``DataTransport.post``.
        """
        direct = self._direct
        if direct is None or not direct.are_clear():
            return first
        library = self._slots[first].team.library
        count, result = serve_exchanges(library, self._servers, first, only_one=self.only_one)
        if result == UNSENT:
            direct.keep_unsent()
        elif count:
            direct.sent()
        if result == UNEXPECTED:  # last, as it may close an edge on which outputs were sent
            direct.give_back()
        return first + count

    def _note(self, place: ServedPlace, served: ServerFields) -> None:
        """Add an exchange that native code has served to the counters and the timer."""
        step, counters = self._step, self._side.counters
        assert step is not None
        step.num_bytes["dispatch"] += served.received_bytes
        step.num_bytes["combine"] += served.sent_bytes
        counters.slot_seconds += (served.computed_ns - served.received_ns) / 1e9
        ends_ns = {"receive": served.received_ns, "experts": served.computed_ns}
        step.timer.add_laps({**ends_ns, "send": served.sent_ns}, *place)
        if step.is_measured:
            rows, num_inputs = served.num_rows, served.exchange.num_inputs
            exchange, by_pair = place.bank.exchanges[place.exchange], served.exchange.by_pair
            received = ReceivedRows(exchange, rows * num_inputs, rows, bool(by_pair))
            counters.add_padding(received, UsedRows(served.num_rows_here, served.num_pairs))

    def _prepare(
        self, direct: DirectEdges, step: ServedStep, place: ServedPlace, slots: NativeSlots
    ) -> ServerFields:
        bank, side = place.bank, self._side
        filled, counts = step.filled[bank.index].table[:-1], side.counters.token_counts[bank.index]
        assert filled.dtype == torch.bool
        assert len(counts) >= len(filled)
        key = bank.index, place.exchange, place.micro_batch
        fields = self._known.get(key)
        if fields is None:
            common = exchange_fields(direct, bank, *key[1:], side.dtype)
            fields = self._known[key] = ServerFields(exchange=common)
        by_pair = bank.exchanges[place.exchange].returns_pairs(step.combine_mode)
        fields.exchange.by_pair = by_pair
        fields.team = slots.team.pointer
        fields.experts = slots.table.fields
        fields.experts.rounds_products = not bank.float32_weights
        fields.filled, fields.num_filled = filled.data_ptr(), len(filled)
        fields.counts = counts.data_ptr()
        fields.progress = ctypes.addressof(side.activity.native_progress)
        fields.rows = ctypes.addressof(self._rows[place.micro_batch])
        return fields
