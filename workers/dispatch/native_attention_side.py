"""Attention side of an exchange in two calls of native (compiled C) code, to send and to receive.

Native code runs a step if every expert rank gets every row, the transport is sockets and the
kernels support the model's dtype. In every unexpected case native code stops, and
``StaticExchange``, the reference in Python, continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workers.dispatch.combine import RemoteHandle, SentRows
from workers.dispatch.native_fields import GrowingBuffer, exchange_fields
from workers.dispatch.row_exchange import AttentionSide, StaticExchange
from workers.model.config import BankSpec
from workers.model.layers import Dispatch
from workers.native.exchange import (
    UNEXPECTED,
    UNSENT,
    AttentionSideFields,
    dispatch_rows,
    gather_outputs,
)
from workers.native.panels import DTYPES
from workers.native.thread_team import ThreadTeam
from workers.requests.step_header import StepHeader
from workers.transport.direct import DirectEdges
from workers.transport.transport import DataTransport


@dataclass(frozen=True, slots=True)
class NativeRows:
    """Rows that native code has sent to all expert ranks, in one dispatch."""

    fields: AttentionSideFields
    slots_and_weights: Tensor
    """Expert slots of each row on each rank, then the bits of the weights if the rank computes
    weighted sums: [ranks, T, k or 2k] int32. A slot is -1 if another rank computes the expert. The
    next dispatch of the same micro-batch overwrites the memory."""
    weights: Tensor
    """Routing weights, [T, k]; ``fields`` points to this memory."""
    shape: tuple[int, ...]
    """Shape of the combined outputs: [T, out_width] or [T, k, out_width]."""

    @property
    def slots(self) -> Tensor:
        """Expert slots of each row by rank, [ranks, T, k] int32; -1 for experts of another rank."""
        return self.slots_and_weights[:, :, : self.weights.shape[1]]


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeHandle(RemoteHandle):
    """Handle of a dispatch whose rows native code has sent."""

    native: NativeRows


class NativeExchange:
    """Exchanges the rows of one attention rank by native code if possible. Data thread only."""

    def __init__(self, side: AttentionSide, transport: DataTransport, team: ThreadTeam) -> None:
        self._side = side
        self._transport = transport
        self._static = StaticExchange(side, transport)
        self._library = team.library
        self._dtype = side.combiner.dtype
        self._header: StepHeader | None = None
        self._direct: DirectEdges | None = None
        self._fields: dict[tuple[int, int, int], AttentionSideFields] = {}
        self._sent: dict[int, Tensor] = {}
        self._received = GrowingBuffer()

    def begin_step(self, header: StepHeader, *, is_inspected: bool = False) -> None:
        """Begin a step, after ``AttentionSide.maps`` has begun it."""
        self._static.begin_step(header, is_inspected=is_inspected)
        self._header = header
        direct = self._transport.direct(self._side.maps.ranks)
        if direct is not self._direct:
            self._fields.clear()
        self._direct = direct

    def dispatch(self, bank: BankSpec, sent: Dispatch, micro_batch: int) -> RemoteHandle:
        """Send a micro-batch's rows to the expert ranks, by native code or else by Python."""
        num_rows = sent.topk_ids.shape[0]
        if num_rows and num_rows == self._granted(micro_batch):
            with self._side.activity:
                native = self.send_rows(bank, sent, micro_batch)
            if native is not None:
                weights = sent.topk_weights
                place = bank, sent.exchange, micro_batch
                return NativeHandle(*place, num_rows, None, weights, native=native)
        return self._static.dispatch(bank, sent, micro_batch)

    def gather(self, handle: RemoteHandle) -> Tensor:
        """Wait for the outputs of a dispatch and return them, by native code or else by Python."""
        if isinstance(handle, NativeHandle):
            with self._side.activity:
                outputs = self.receive_outputs(handle.native)
            if outputs is not None:
                return outputs
            handle = replace(handle, sent=self._sent_rows(handle.native))
        return self._static.gather(handle)

    # Single dispatches.

    def send_rows(self, bank: BankSpec, sent: Dispatch, micro_batch: int) -> NativeRows | None:
        """Send all granted rows of a micro-batch; return None if native code cannot send now.

        ``sent`` must have as many rows as the step header grants. Raises the errors of
        ``DataTransport.post``.
        """
        direct = self._direct
        if direct is None or not direct.are_clear():
            return None
        slots = self._side.maps.decode_slots[sent.bank]
        ids, weights = sent.topk_ids.contiguous(), sent.topk_weights.contiguous()
        inputs = sent.rows.contiguous()
        assert ids.dtype == torch.int64
        assert inputs.dtype == self._dtype
        num_rows, top_k = ids.shape
        fields = self._fields_for(direct, bank, sent.exchange, micro_batch)
        num_ranks, fields.num_experts = slots.shape
        width = top_k if fields.exchange.by_pair else 2 * top_k
        out = self._slots_and_weights(num_ranks, num_rows, width, micro_batch)
        fields.slots, fields.ids, fields.weights = (
            slots.data_ptr(),
            ids.data_ptr(),
            weights.data_ptr(),
        )
        fields.num_rows, fields.weights_dtype = num_rows, DTYPES.index(weights.dtype)
        fields.inputs, fields.sent = inputs.data_ptr(), out.data_ptr()
        if dispatch_rows(self._library, fields) == UNSENT:
            direct.keep_unsent()
        else:
            direct.sent()
        out_width = bank.exchanges[sent.exchange].out_width
        shape = (num_rows, out_width) if fields.is_weighted else (num_rows, top_k, out_width)
        return NativeRows(fields, out, weights, shape)

    def receive_outputs(self, rows: NativeRows) -> Tensor | None:
        """Receive the outputs of sent rows; return None if Python must receive them.

        Raises the errors of ``DataTransport.receive``.
        """
        direct, fields = self._direct, rows.fields
        if direct is None or not direct.are_clear():
            return None
        num_bytes = self._num_received(fields, len(rows.slots_and_weights), *rows.weights.shape)
        fields.received = self._received.of(num_bytes)
        out = torch.empty(rows.shape, dtype=self._dtype)
        fields.out = out.data_ptr()
        if gather_outputs(self._library, fields) == UNEXPECTED:
            direct.give_back()
            return None
        return out

    def _sent_rows(self, native: NativeRows) -> tuple[SentRows, ...]:
        """Return what Python needs to receive outputs: the rows or pairs that each rank returns."""
        if native.fields.exchange.by_pair:
            return self._static.pairs_of(native.slots)
        num_rows = native.slots.shape[1]
        return tuple(SentRows(rank, None, num_rows) for rank in self._side.maps.ranks)

    # Native layers, which run all exchanges of a step in one call.

    def prepare(self, num_rows: Sequence[int]) -> list[list[AttentionSideFields]] | None:
        """Return the parameters of a step's exchanges for native layers, by micro-batch and bank.

        Native layers run all layers of a step in one call. ``num_rows``: number of rows of each
        micro-batch. Returns None if Python must dispatch the rows layer by layer. All banks must
        have the same top-k. Raises the errors of ``DataTransport.post``.
        """
        banks, slots, direct = self._side.banks, self._side.maps.decode_slots, self._direct
        assert self._header is not None, "begin_step was not called"
        granted = [self._granted(i) for i in range(self._header.num_micro_batches)]
        has_others = any(len(bank.exchanges) > 1 for bank in banks)
        if granted != list(num_rows) or has_others or direct is None or not direct.are_clear():
            return None
        num_ranks, (top_k,) = slots[0].shape[0], {bank.top_k for bank in banks}
        by_micro_batch = []
        for micro_batch, count in enumerate(num_rows):
            exchanges = [self._fields_for(direct, bank, 0, micro_batch) for bank in banks]
            width = top_k if exchanges[0].exchange.by_pair else 2 * top_k
            sent = self._slots_and_weights(num_ranks, count, width, micro_batch)
            for fields, table in zip(exchanges, slots, strict=True):
                fields.slots, fields.num_experts = table.data_ptr(), table.shape[1]
                fields.sent = sent.data_ptr()
            by_micro_batch.append(exchanges)
        most = max(num_rows)  # outputs are summed before the next ones are received
        received = self._received.of(
            max(self._num_received(fields, num_ranks, most, top_k) for fields in by_micro_batch[0])
        )
        for exchanges in by_micro_batch:
            for fields in exchanges:
                fields.received = received
        direct.sent()  # starts to watch the paths of the edges
        return by_micro_batch

    def stopped(self, result: int) -> None:
        """Let Python continue the exchange in which native layers have stopped.

        ``result``: ``UNSENT`` if bytes are left to send, ``UNEXPECTED`` if Python must receive.
        Raises ``PeerLostError``.
        """
        assert self._direct is not None
        if result == UNSENT:
            self._direct.keep_unsent()
        else:
            self._direct.give_back()

    def pending(self, bank: int, micro_batch: int, weights: Tensor) -> RemoteHandle:
        """Return a handle for rows that native layers sent before they stopped.

        ``weights``: routing weights of the rows, [T, k]. Pass the result to ``gather``.
        """
        spec, num_rows = self._side.banks[bank], len(weights)
        fields, sent = self._fields[bank, 0, micro_batch], self._sent[micro_batch]
        native = NativeRows(fields, sent, weights, (num_rows, spec.exchanges[0].out_width))
        return NativeHandle(spec, 0, micro_batch, num_rows, None, weights, native=native)

    def _granted(self, micro_batch: int) -> int:
        assert self._header is not None, "begin_step was not called"
        return self._header.rows(self._side.rank, micro_batch)

    def _fields_for(
        self, direct: DirectEdges, bank: BankSpec, exchange: int, micro_batch: int
    ) -> AttentionSideFields:
        key, spec = (bank.index, exchange, micro_batch), bank.exchanges[exchange]
        fields = self._fields.get(key)
        if fields is None:
            fields = self._fields[key] = AttentionSideFields(
                exchange=exchange_fields(direct, bank, exchange, micro_batch, self._dtype),
                is_weighted=spec.weighted,
                rounds_products=not bank.float32_weights,
            )
        fields.exchange.by_pair = spec.returns_pairs(self._side.maps.combine_mode)
        return fields

    def _num_received(
        self, fields: AttentionSideFields, num_ranks: int, num_rows: int, top_k: int
    ) -> int:
        """Return the size in bytes of the messages with outputs of all expert ranks."""
        exchange = fields.exchange
        row_bytes = top_k * self._dtype.itemsize if exchange.by_pair else num_ranks * 4
        return int(num_rows * exchange.out_width * row_bytes)

    def _slots_and_weights(
        self, num_ranks: int, num_rows: int, width: int, micro_batch: int
    ) -> Tensor:
        """Return a buffer for the slots and weights of a micro-batch's rows, [ranks, T, width]
        int32; each call for the micro-batch may return the same buffer."""
        sent = self._sent.get(micro_batch)
        if sent is None or sent.shape != (num_ranks, num_rows, width):
            sent = torch.empty(num_ranks, num_rows, width, dtype=torch.int32)
            self._sent[micro_batch] = sent
        return sent
