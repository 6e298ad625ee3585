"""Attention side of exchanges: sends rows to expert ranks over a transport, receives outputs.

Parts of a message to an expert rank, by kind of exchange:

    static    slots [n, k] of all n granted rows (-1 for another rank) and the rows, padded to the
              header's bucket; with an edge limit fewer rows, sorted so that the rows with an
              expert on the receiving rank are first
    exact     slots and data of only the rows with an expert on the rank, preceded by their counts

In ``sum`` mode the weights follow the slots, as the bits of float32 in the same int32 part. The
reply is one partial sum for each sent row, in float32 or rounded to the model's dtype
(``DataTransport.sums_are_rounded``), or else one output for each (row, slot) pair, in order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.dispatch.combine import OutputCombiner, RemoteHandle, SentRows
from workers.dispatch.dispatcher import picks_rows
from workers.dispatch.edge_rows import EdgeRows
from workers.dispatch.expert_maps import ExpertMaps
from workers.metrics.activity import Activity
from workers.metrics.step_metrics import is_measured
from workers.model.config import BankSpec
from workers.model.layers import Dispatch
from workers.requests.step_header import StepHeader
from workers.transport.transport import DataTransport, ExpectedMessage, PartShape, RowMessage, Tag


@dataclass(frozen=True, slots=True)
class AttentionSide:
    """Objects that all ``RowExchange`` objects of one attention rank share."""

    rank: int
    banks: tuple[BankSpec, ...]
    maps: ExpertMaps
    edge_rows: EdgeRows
    combiner: OutputCombiner
    activity: Activity


class RowExchange(Protocol):
    """Sends the rows of one attention rank to the expert ranks, and receives their outputs."""

    def begin_step(self, header: StepHeader, *, is_inspected: bool = False) -> None:
        """Begin a step, after ``AttentionSide.maps`` has begun it.

        ``is_inspected``: the host reads values between the layers.
        """

    def dispatch(self, bank: BankSpec, sent: Dispatch, micro_batch: int) -> RemoteHandle:
        """Send a micro-batch's rows to the expert ranks, without waiting for outputs."""

    def gather(self, handle: RemoteHandle) -> Tensor:
        """Wait for the outputs of a dispatch and return them; see ``TokenDispatcher.combine``."""


@dataclass(frozen=True, slots=True)
class _RoutedRows:
    """The rows of a dispatch with the expert slots that compute them."""

    inputs: Tensor
    """Inputs of the experts: [T, width], or [T, k, width] if ``per_slot`` (each of a row's k
    experts has its own input)."""
    per_slot: bool
    meta: Tensor
    """Slots of each row on each expert rank, then the bits of the weights if the rank computes
    weighted sums: [ranks, T, k or 2k] int32."""
    slots: Tensor
    """Slots of each row by expert rank, [ranks, T, k] int32; -1 for experts of another rank."""
    pairs: Sequence[SentRows]
    """(Row, slot) pairs of each expert rank; empty unless outputs, or inputs of an exact exchange,
    are sent by pair."""


_Split = tuple[list[RowMessage], tuple[SentRows, ...]]
"""Messages of a dispatch to the expert ranks, and the rows sent to each of these ranks."""


class SplitExchange(ABC):
    """``RowExchange`` over a transport. A subclass selects the rows for each expert rank."""

    is_sized: ClassVar[bool]
    """Whether messages carry their row counts, because the expert ranks do not know them."""

    def __init__(self, side: AttentionSide, transport: DataTransport) -> None:
        self._side = side
        self._transport = transport
        dtype = side.combiner.dtype
        self._sums_dtype = dtype if transport.sums_are_rounded else torch.float32
        self._header: StepHeader | None = None
        self._must_wait = False

    def begin_step(self, header: StepHeader, *, is_inspected: bool = False) -> None:
        """Begin a step, after ``AttentionSide.maps`` has begun it.

        ``is_inspected``: the host reads values between the layers. It then waits for outputs here,
        where it notices that a peer is lost.
        """
        self._header = header
        is_read = picks_rows(header, self._side.banks, self._side.maps.combine_mode)
        # the last, as a lap would end too early
        self._must_wait = is_read or is_inspected or is_measured(header)

    def dispatch(self, bank: BankSpec, sent: Dispatch, micro_batch: int) -> RemoteHandle:
        """Send a micro-batch's rows to the expert ranks, without waiting for outputs."""
        assert self._header is not None, "begin_step was not called"
        side, num_rows = self._side, sent.topk_ids.shape[0]
        granted = self._header.rows(side.rank, micro_batch)
        assert num_rows <= granted, f"{num_rows} rows, {granted} granted"
        weights = sent.topk_weights
        if not self._header.edge_rows(side.rank, micro_batch):
            return RemoteHandle(bank, sent.exchange, micro_batch, num_rows, None, weights)
        exchange = bank.exchanges[sent.exchange]
        by_pair, per_slot = exchange.returns_pairs(side.maps.combine_mode), exchange.per_slot_input
        meta, copies = side.maps.choose(sent, micro_batch, with_weights=not by_pair)
        slots = meta[:, :, : bank.top_k]
        pairs = self.pairs_of(slots) if by_pair or (self.is_sized and per_slot) else ()
        rows = _RoutedRows(sent.rows, per_slot, meta, slots, pairs)
        messages, by_rank = self._split(rows, self._header, micro_batch)
        tag = Tag(sent.bank, sent.exchange, micro_batch, "rows")
        with side.activity:  # waits if the buffers are full
            self._transport.post(tag, messages, sized=self.is_sized)
        sent_rows = pairs if by_pair else by_rank
        return RemoteHandle(
            bank, sent.exchange, micro_batch, num_rows, copies, weights, tuple(sent_rows)
        )

    def gather(self, handle: RemoteHandle) -> Tensor:
        """Wait for the outputs of a dispatch and return them; see ``TokenDispatcher.combine``."""
        side = self._side
        exchange = handle.bank.exchanges[handle.exchange]
        by_pair = exchange.returns_pairs(side.maps.combine_mode)
        part = PartShape(exchange.out_width, side.combiner.dtype if by_pair else self._sums_dtype)
        tag = Tag(handle.bank.index, handle.exchange, handle.micro_batch, "outputs")
        expected = [ExpectedMessage(s.rank, (part,), (s.count,)) for s in handle.sent]
        with side.activity:
            found = self._transport.receive(tag, expected, sized=False, must_wait=self._must_wait)
        return side.combiner.combine(handle, [parts[0] for parts in found], by_pair)

    @abstractmethod
    def _split(self, rows: _RoutedRows, header: StepHeader, micro_batch: int) -> _Split:
        """Select the rows for each expert rank and create the messages with them."""

    def pairs_of(self, slots: Tensor) -> tuple[SentRows, ...]:
        """Return the (row, slot) pairs of each expert rank, without ranks that have none.

        slots [ranks, T, k], -1 for experts of another rank. Pairs are numbered in row-major order
        of [T, k].
        """
        sent = []
        for rank, own in zip(self._side.maps.ranks, slots, strict=True):
            places = (own.flatten() >= 0).nonzero().squeeze(1)  # device-to-host sync
            count = len(places)
            if count:
                sent.append(SentRows(rank, None if count == own.numel() else places, count))
        return tuple(sent)


class StaticExchange(SplitExchange):
    """Exchange that sends each expert rank as many rows as the step header states.

    Without an edge limit it sends all rows, padded to the bucket; with one, needed rows come first.
    """

    is_sized = False

    def _split(self, rows: _RoutedRows, header: StepHeader, micro_batch: int) -> _Split:
        side, meta, inputs = self._side, rows.meta, rows.inputs
        _, num_rows, top_k = rows.slots.shape
        num_sent = header.edge_rows(side.rank, micro_batch)
        if side.edge_rows.can_limit:
            is_needed = (rows.slots >= 0).any(2)
            side.edge_rows.note(is_needed, max(header.bucket, num_rows), num_sent)
            if num_sent < num_rows:
                return self._split_needed(is_needed, meta, inputs, num_sent)
        assert num_sent >= num_rows, "the header limits edges that cannot be limited"
        num_inputs = 1
        if rows.per_slot:
            inputs, num_inputs = inputs.flatten(0, 1), top_k
        meta, inputs = _with_empty_rows(meta, inputs, num_sent - num_rows, num_inputs)
        ranks = side.maps.ranks
        messages = [RowMessage(rank, (meta[i], inputs)) for i, rank in enumerate(ranks)]
        return messages, tuple(SentRows(rank, None, num_sent) for rank in ranks)

    def _split_needed(
        self, is_needed: Tensor, meta: Tensor, inputs: Tensor, num_sent: int
    ) -> _Split:
        """Create messages of ``num_sent`` rows to each rank, with the rows that it needs first.

        is_needed [ranks, T] bool: whether the rank has an expert of the row.
        """
        places = _needed_first(is_needed)[:, :num_sent]
        chosen = meta.gather(1, places.unsqueeze(2).expand(-1, -1, meta.shape[2]))
        chosen, picked = _with_empty_rows(chosen, inputs[places], num_sent - places.shape[1])
        ranks = self._side.maps.ranks
        messages = [RowMessage(rank, (chosen[i], picked[i])) for i, rank in enumerate(ranks)]
        return messages, tuple(SentRows(r, places[i], num_sent) for i, r in enumerate(ranks))


class ExactExchange(SplitExchange):
    """Exchange that sends each expert rank only the rows with an expert on that rank, each once.

    If each of a row's k experts has its own input, the inputs of the rank's experts are sent.
    """

    is_sized = True

    def _split(self, rows: _RoutedRows, header: StepHeader, micro_batch: int) -> _Split:
        here = (rows.slots >= 0).any(2)
        needed = _places(here)  # device-to-host sync
        num_rows = here.shape[1]
        flat = rows.inputs.flatten(0, 1) if rows.per_slot else rows.inputs
        own_pairs = {sent.rank: sent.places for sent in rows.pairs}
        messages, sent_rows = [], []
        for i, (rank, places) in enumerate(zip(self._side.maps.ranks, needed, strict=True)):
            count = len(places)
            is_all = count == num_rows
            part = rows.meta[i] if is_all else rows.meta[i][places]
            inputs = flat[:0]
            if not rows.per_slot:
                inputs = flat if is_all else flat[places]
            elif rank in own_pairs:
                own = own_pairs[rank]
                inputs = flat if own is None else flat[own]
            messages.append(RowMessage(rank, (part, inputs)))
            if count:
                sent_rows.append(SentRows(rank, None if is_all else places, count))
        return messages, tuple(sent_rows)


class CapturedExchange(StaticExchange):
    """Static exchange of a captured step, in which the host reads nothing."""

    def begin_step(self, header: StepHeader, *, is_inspected: bool = False) -> None:
        """Begin a captured step, in which receives do not make the host wait."""
        super().begin_step(header, is_inspected=is_inspected)
        self._must_wait = False


def _places(is_needed: Tensor) -> list[Tensor]:
    """Return the rows that each rank needs, in ascending order, after one wait for the device."""
    if is_needed.is_cpu:
        return [row.nonzero().squeeze(1) for row in is_needed]
    order, counts = _needed_first(is_needed), is_needed.sum(1).tolist()
    return [rows[:count] for rows, count in zip(order, counts, strict=True)]


def _needed_first(is_needed: Tensor) -> Tensor:
    """Return the rows in ascending order, for each rank those that it needs first, [ranks, T].

    is_needed [ranks, T] bool: whether the rank has an expert of the row.
    """
    return is_needed.byte().argsort(dim=1, descending=True, stable=True)


def _with_empty_rows(
    meta: Tensor, rows: Tensor, count: int, num_inputs: int = 1
) -> tuple[Tensor, Tensor]:
    """Append ``count`` rows without a request, with ``num_inputs`` inputs each.

    Such rows pad a bucket, or replace rows of a request that ended between proposal and header.
    meta [ranks, n, m] gets the slot -1 in the new rows; rows [.., n * num_inputs, width] get zeros.
    """
    if not count:
        return meta, rows
    return F.pad(meta, (0, 0, 0, count), value=-1), F.pad(rows, (0, 0, 0, count * num_inputs))
