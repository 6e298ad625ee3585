"""The attention side of dispatch and combine, over any transport.

The parts of a message to an expert rank:

    static split    slots [n, k] for all n granted rows (-1: another rank), the rows as they are,
                    filled up to the header's bucket; with an edge limit only so many rows, those
                    with an expert there first
    exact split     the same for the rows that have an expert there, counts first

The reply in ``sum`` mode is one partial sum for each row sent, in float32 or rounded to the model's
type (``DataTransport.sums_are_rounded``), else one output for each (row, slot) pair in row-major
order. In ``sum`` mode the weights travel beside the slots, as the bits of float32 in the same int32
part.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from msgspec.structs import replace as replace_fields
from torch import Tensor

from cluster.config.cluster import CombineMode
from cluster.core.placement import BankPlacement, ExpertPlacement
from cluster.core.topology import Generation
from workers.cuda.step_graph import StepGraph
from workers.dispatch.copies import ChosenCopies, CopyTables, EpochTables
from workers.dispatch.dispatcher import (
    BatchRows,
    CapturedExchanges,
    DispatchHandle,
    TimedDispatcher,
    has_known_sizes,
    must_wait,
    picks_rows,
)
from workers.dispatch.edge_rows import EdgeRows, NeededRows
from workers.dispatch.native_home import NativeHome, NativeRows
from workers.dispatch.recording import FixedTables, RecordingTransport
from workers.metrics.activity import Activity
from workers.metrics.step_timer import StepTimer
from workers.model.config import BankSpec, returns_pairs
from workers.model.layers import Dispatch
from workers.model.weighting import weighted_sum
from workers.native.exchange import HomeFields, sent_slots
from workers.native.panels import DTYPES
from workers.native.team import Team
from workers.requests.step_header import Grant, StepHeader
from workers.transport.transport import DataTransport, Expected, Part, RowMessage, Tag


@dataclass(frozen=True, slots=True)
class Sent:
    """What one expert rank was sent, and so what it returns."""

    rank: int
    places: Tensor | None
    """Destination of the returned rows: rows [n] in ``sum`` mode, else pairs [P] in row-major order
    of [T, k]; None when all of them return, in order."""
    count: int
    """Rows that come back."""


@dataclass(frozen=True, slots=True)
class RemoteHandle(DispatchHandle):
    """A dispatch under way."""

    sent: tuple[Sent, ...]
    """By expert rank; ranks that return nothing are left out. Of ``native`` rows: none."""
    topk_weights: Tensor
    """[T, k] as dispatched."""
    native: NativeRows | None = None


class CapturedRows:
    """The rows of a captured step of one attention rank."""

    def __init__(self, dispatcher: RemoteDispatcher) -> None:
        self.needed: NeededRows = ()
        self._dispatcher = dispatcher

    def replayed(self) -> None:
        """See ``CapturedExchanges``."""
        self._dispatcher.replayed(self)


class RemoteDispatcher(TimedDispatcher):
    """``TokenDispatcher`` of one attention rank. Data thread only."""

    def __init__(
        self,
        transport: DataTransport,
        banks: Sequence[BankSpec],
        *,
        rank: int,
        combine_mode: CombineMode,
        dtype: torch.dtype,
        device: torch.device,
        activity: Activity | None = None,
        timer: StepTimer | None = None,
        team: Team | None = None,
    ) -> None:
        """``team`` on CPUs: compiled kernels, in place of torch."""
        super().__init__(banks, timer)
        self._team = team if dtype in DTYPES else None
        self._native = None if self._team is None else NativeHome(self._team, dtype)
        self._transport = transport
        self.activity = activity or Activity()
        """Advances with each exchange."""
        self.rank = rank
        """Of the attention worker."""
        self._configured_mode = self._combine_mode = combine_mode
        self._dtype = dtype
        self._device = device
        self._ranks: tuple[int, ...] = ()
        self._epochs = EpochTables[list[CopyTables]]()
        self._built: dict[int, tuple[BankPlacement, Mapping[int, int], CopyTables]] = {}
        self._tables: list[CopyTables] = []
        self._header: StepHeader | None = None
        self._micro_batches: Sequence[BatchRows] = ()
        self._must_wait = False
        self._edge_rows = EdgeRows()
        self._is_row: Tensor | None = None
        """[micro-batches, T] int64 of a step that is captured: 0 for rows without a request."""
        self._fixed = FixedTables()
        self._decode_slots: Sequence[Tensor] = ()
        """By bank, on a GPU: ``CopyTables.decode_slots`` where captured steps read them."""
        self._placement_seen = 0, 0
        """Generation and epoch of the latest step."""
        self._can_limit = False
        self._sums_dtype = dtype if transport.sums_are_rounded else torch.float32

    def set_placement(self, placement: ExpertPlacement, generation: Generation) -> None:
        """Take the maps of an epoch and drop those of an earlier generation.

        Raises ``ProtocolError`` when the maps use a device that no member has.
        """
        members = generation.experts
        device_index = {m.device: i for i, m in enumerate(members)}
        tables = [self._table(i, b, device_index) for i, b in enumerate(placement.banks)]
        self._ranks = tuple(m.rank for m in members)
        self._combine_mode = "per_slot" if generation.returns_slots else self._configured_mode
        self._epochs.add(generation.number, placement.epoch, tables)
        if generation.number != self._placement_seen[0]:
            self._edge_rows.forget()
        self._can_limit = (
            self._native is None
            and not returns_pairs(self._banks, self._combine_mode)
            and not any(e.per_slot_input for bank in self._banks for e in bank.exchanges)
            and len(members) > max(bank.top_k for bank in self._banks)
        )

    def _table(
        self, index: int, bank: BankPlacement, device_index: Mapping[int, int]
    ) -> CopyTables:
        """The tables of a bank, reused from the last epoch where its maps have not changed."""
        known = self._built.get(index)
        if known is None or known[:2] != (bank, device_index):
            tables = CopyTables.build(bank, device_index, self._device)
            known = self._built[index] = bank, device_index, tables
        return known[2]

    def begin_step(self, header: StepHeader, micro_batches: Sequence[BatchRows]) -> None:
        """See ``TokenDispatcher``. Raises ``ProtocolError`` for an epoch that is not known."""
        self._set_header(header)
        self.timer.begin_step(header)
        self._micro_batches = micro_batches
        self._edge_rows.begin_step()
        if (header.generation, header.epoch) != self._placement_seen:
            self._placement_seen = header.generation, header.epoch
            self._edge_rows.forget()
        with self.activity:
            self._transport.begin_step(header)
        if self._native is not None:
            sends_all = not (header.exact or header.edge_limit or header.bucket)
            self._native.begin_step(self._transport.direct(self._ranks) if sends_all else None)

    # ``CapturableDispatcher``

    def can_capture(self, header: StepHeader) -> bool:
        """See ``CapturableDispatcher``."""
        return has_known_sizes(header, self._banks, self._combine_mode)

    @property
    def captured_state(self) -> Hashable:
        """See ``CapturableDispatcher``."""
        return self._ranks, self._combine_mode, self._fixed.version

    def captured_shape(self, header: StepHeader) -> Hashable:
        """See ``CapturableDispatcher``."""
        return header.edge_limit

    @contextmanager
    def capture(self, is_row: Tensor, graph: StepGraph | None) -> Iterator[CapturedExchanges]:
        """See ``CapturableDispatcher``."""
        under_way, live = self._header, self._transport
        assert under_way is not None, "begin_step comes first"
        self._transport = RecordingTransport(live, self._device, self.activity, graph)
        try:
            with self.as_captured(self.captured_header(under_way, len(is_row)), is_row) as rows:
                yield rows
        finally:
            self._transport = live
        self.begin_step(under_way, ())

    def captured_header(self, header: StepHeader, num_rows: int) -> StepHeader:
        """A step with so many decode rows of this rank, and those of the others as they are."""
        own = Grant(decode_rows=num_rows)
        grants = tuple((r, own if r == self.rank else grant) for r, grant in header.grants)
        return replace_fields(header, grants=grants)

    @contextmanager
    def as_captured(self, header: StepHeader, is_row: Tensor) -> Iterator[CapturedRows]:
        """``capture`` over the transport as it is; ``begin_step`` follows."""
        self._set_header(header)
        self._edge_rows.begin_step()
        self.timer.pause()
        self._must_wait = False
        self._is_row = is_row.view(header.num_micro_batches, -1)
        rows = CapturedRows(self)
        yield rows
        rows.needed = self._edge_rows.take_noted()

    def replayed(self, rows: CapturedRows) -> None:
        """A captured step of this rank was replayed."""
        self._edge_rows.put_noted(rows.needed)
        self.activity.advance()

    def _set_header(self, header: StepHeader) -> None:
        self._tables = self._epochs.begin_step(header)
        self._header = header
        self._must_wait = must_wait(header, self._banks, self._combine_mode)
        self._is_row = None
        if self._device.type == "cuda":
            self._decode_slots = self._fixed.copy_in([own.decode_slots for own in self._tables])

    def picks_rows(self, header: StepHeader) -> bool:
        """Whether the host reads which rows or pairs are whose in a step."""
        return picks_rows(header, self._banks, self._combine_mode)

    def sit_out(self, header: StepHeader) -> None:
        """Drop old maps; an attention rank without rows takes no part in the exchanges."""
        self.timer.begin_step(header)
        self._edge_rows.begin_step()
        self._epochs.forget(header.oldest_epoch)

    def _dispatch(self, bank: BankSpec, sent: Dispatch, micro_batch: int) -> RemoteHandle:
        assert self._header is not None, "begin_step comes first"
        granted = self._header.rows(self.rank, micro_batch)
        num_rows = sent.topk_ids.shape[0]
        assert num_rows <= granted, f"{num_rows} rows, {granted} granted"
        by_rank: tuple[Sent, ...] = ()
        copies: ChosenCopies | None = None
        native = self._dispatch_natively(bank, sent, micro_batch) if num_rows == granted else None
        if granted and native is None:
            exchange, is_exact = bank.exchanges[sent.exchange], self._header.exact
            by_pair = exchange.returns_pairs(self._combine_mode)
            meta, copies = self._choose(sent, micro_batch, None if by_pair else sent.topk_weights)
            slots = meta[:, :, : bank.top_k]
            per_slot = exchange.per_slot_input
            pairs = self._sent_pairs(slots) if by_pair or (is_exact and per_slot) else ()
            if is_exact:
                messages, by_rank = self._pick_exact(slots, meta, sent.rows, per_slot, pairs)
            else:
                num_sent = self._header.edge_rows(self.rank, micro_batch)
                messages, by_rank = self._pick_static(slots, meta, sent.rows, per_slot, num_sent)
            by_rank = pairs if by_pair else by_rank
            tag = Tag(sent.bank, sent.exchange, micro_batch, "rows")
            with self.activity:  # the buffers may be full
                self._transport.post(tag, messages, sized=is_exact)
        return RemoteHandle(
            bank, sent.exchange, micro_batch, num_rows, copies, by_rank, sent.topk_weights, native
        )

    def _dispatch_natively(
        self, bank: BankSpec, sent: Dispatch, micro_batch: int
    ) -> NativeRows | None:
        """Send rows by native code; None where that cannot be, and nothing was sent."""
        if self._native is None or not sent.topk_ids.shape[0]:
            return None
        by_pair = bank.exchanges[sent.exchange].returns_pairs(self._combine_mode)
        slots = self._tables[sent.bank].decode_slots
        with self.activity:
            return self._native.dispatch(bank, sent, slots, micro_batch, by_pair)

    def homes(self, num_rows: Sequence[int]) -> list[list[HomeFields]] | None:
        """For native layers: by micro-batch of so many rows and by bank, the exchanges of a step.

        None: this step's rows are dispatched. Raises as ``dispatch``.
        """
        header, native = self._header, self._native
        assert header is not None, "begin_step comes first"
        granted = [header.rows(self.rank, i) for i in range(header.num_micro_batches)]
        has_others = any(len(bank.exchanges) > 1 for bank in self._banks)
        if native is None or granted != list(num_rows) or has_others:
            return None
        by_pair = self._banks[0].exchanges[0].returns_pairs(self._combine_mode)
        slots = [tables.decode_slots for tables in self._tables]
        return native.prepare(self._banks, slots, num_rows, by_pair)

    def stopped(self, result: int) -> None:
        """Native layers have stopped; ``result`` says why. Raises as ``dispatch``."""
        assert self._native is not None
        self._native.stopped(result)

    def waiting(self, bank: int, micro_batch: int, weights: Tensor) -> DispatchHandle:
        """A dispatch of native layers whose outputs are to be combined; weights [T, k]."""
        assert self._native is not None
        spec = self._banks[bank]
        native = self._native.waiting(spec, micro_batch, weights)
        return RemoteHandle(spec, 0, micro_batch, len(weights), None, (), weights, native)

    def finish_step(self) -> None:
        """See ``TokenDispatcher``."""
        with self.activity:
            self._transport.finish_step()
        self._edge_rows.finish_step()

    def end_step(self) -> bool:
        """See ``TokenDispatcher``."""
        return self._edge_rows.end_step()

    @property
    def edge_share(self) -> int:
        """See ``StepProposal``."""
        return self._edge_rows.share if self._can_limit else 0

    def gather(self, handle: DispatchHandle) -> Tensor:
        assert isinstance(handle, RemoteHandle)
        exchange = handle.bank.exchanges[handle.exchange]
        by_pair = exchange.returns_pairs(self._combine_mode)
        if handle.native is not None:
            assert self._native is not None
            with self.activity:
                outputs = self._native.gather(handle.native)
            if outputs is not None:
                return outputs
            handle = replace(handle, sent=self._sent_by(handle.native, by_pair))
        part = Part(exchange.out_width, self._dtype if by_pair else self._sums_dtype)
        tag = Tag(handle.bank.index, handle.exchange, handle.micro_batch, "outputs")
        expected = [Expected(s.rank, (part,), (s.count,)) for s in handle.sent]
        with self.activity:
            found = self._transport.receive(tag, expected, sized=False, must_wait=self._must_wait)
            received = [parts[0] for parts in found]
        if not by_pair:
            return self._add_partial_sums(handle, received, exchange.out_width)
        pairs = self._gather_pairs(handle, received, exchange.out_width)
        if not exchange.weighted:
            return pairs.view(handle.num_rows, handle.bank.top_k, exchange.out_width)
        return self._weigh(handle, pairs)

    # Dispatch: what goes to which rank.

    def _choose(
        self, sent: Dispatch, micro_batch: int, weights: Tensor | None
    ) -> tuple[Tensor, ChosenCopies | None]:
        """[ranks, T, k] int32 slots, with weights [ranks, T, 2k]; see ``CopyTables.choose``."""
        assert self._header is not None, "begin_step comes first"
        tables = self._tables[sent.bank]
        has_choice = self._header.exact and tables.has_choice
        if self._team is not None and not has_choice:
            library = self._team.library
            return sent_slots(library, tables.decode_slots, sent.topk_ids, weights), None
        copies = None
        if has_choice:
            batch = self._micro_batches[micro_batch]
            slots, copies = tables.choose(sent.topk_ids, batch.is_prefill, batch.row_key)
        else:
            fixed = self._decode_slots[sent.bank] if self._decode_slots else tables.decode_slots
            slots = fixed[:, sent.topk_ids]
        if self._is_row is not None:
            slots = slots.where(self._is_row[micro_batch].unsqueeze(1) != 0, -1)
        return slots if weights is None else _with_weights(slots, weights), copies

    def _pick_static(
        self,
        slots: Tensor,
        meta: Tensor,
        rows: Tensor,
        per_slot_input: bool,
        num_sent: int,
    ) -> tuple[list[RowMessage], tuple[Sent, ...]]:
        """All rows to every rank, or those that it needs: as many as the header says."""
        num_rows = slots.shape[1]
        if self._can_limit:
            is_needed = (slots >= 0).any(2)
            assert self._header is not None
            self._edge_rows.note(is_needed, max(self._header.bucket, num_rows), num_sent)
            if num_sent < num_rows:
                return self._pick_needed(is_needed, meta, rows, num_sent)
        assert num_sent >= num_rows, "edges are limited that cannot be"
        if per_slot_input:
            rows = rows.flatten(0, 1)
        inputs = slots.shape[2] if per_slot_input else 1
        meta, rows = _with_empty_rows(meta, rows, num_sent - num_rows, inputs)
        messages = [RowMessage(r, (meta[i], rows)) for i, r in enumerate(self._ranks)]
        return messages, tuple(Sent(rank, None, num_sent) for rank in self._ranks)

    def _pick_needed(
        self, is_needed: Tensor, meta: Tensor, rows: Tensor, num_sent: int
    ) -> tuple[list[RowMessage], tuple[Sent, ...]]:
        """So many rows to every rank, those that it needs ([ranks, T] bool) first."""
        order = is_needed.byte().argsort(dim=1, descending=True, stable=True)
        places = order[:, :num_sent]
        chosen = meta.gather(1, places.unsqueeze(2).expand(-1, -1, meta.shape[2]))
        chosen, inputs = _with_empty_rows(chosen, rows[places], num_sent - places.shape[1])
        messages = [RowMessage(rank, (chosen[i], inputs[i])) for i, rank in enumerate(self._ranks)]
        sent = [Sent(rank, places[i], num_sent) for i, rank in enumerate(self._ranks)]
        return messages, tuple(sent)

    def _pick_exact(
        self,
        slots: Tensor,
        meta: Tensor,
        rows: Tensor,
        per_slot_input: bool,
        pairs: Sequence[Sent],
    ) -> tuple[list[RowMessage], tuple[Sent, ...]]:
        """Each rank gets the rows that have an expert there, each row once.

        With an input per slot it gets the inputs of its ``pairs``.
        """
        here = (slots >= 0).any(2)
        flat = rows.flatten(0, 1) if per_slot_input else rows
        own_pairs = {sent.rank: sent.places for sent in pairs}
        messages, sent_rows = [], []
        for i, rank in enumerate(self._ranks):
            places = here[i].nonzero().squeeze(1)  # device-to-host sync
            count = len(places)
            is_all = count == len(here[i])
            part = meta[i] if is_all else meta[i][places]
            inputs = flat[:0]
            if not per_slot_input:
                inputs = rows if is_all else rows[places]
            elif rank in own_pairs:
                own = own_pairs[rank]
                inputs = flat if own is None else flat[own]
            messages.append(RowMessage(rank, (part, inputs)))
            if count:
                sent_rows.append(Sent(rank, None if is_all else places, count))
        return messages, tuple(sent_rows)

    def _sent_pairs(self, slots: Tensor) -> tuple[Sent, ...]:
        """The pairs [T * k] that each rank computes; ranks without pairs are left out."""
        sent = []
        for rank, mine in zip(self._ranks, slots, strict=True):
            places = (mine.flatten() >= 0).nonzero().squeeze(1)  # device-to-host sync
            count = len(places)
            if count:
                sent.append(Sent(rank, None if count == mine.numel() else places, count))
        return tuple(sent)

    def _sent_by(self, native: NativeRows, by_pair: bool) -> tuple[Sent, ...]:
        """What native code has sent to each rank."""
        if by_pair:
            return self._sent_pairs(native.slots)
        return tuple(Sent(rank, None, native.slots.shape[1]) for rank in self._ranks)

    # Combine: from the replies to the result.

    def _add_partial_sums(
        self, handle: RemoteHandle, received: Sequence[Tensor], width: int
    ) -> Tensor:
        """Add in float32 in rank order and round once."""
        total: Tensor | None = None
        for sent, part in zip(handle.sent, received, strict=True):
            if sent.places is None:  # rows without a request come last
                part = part if sent.count == handle.num_rows else part[: handle.num_rows]
                total = part.float() if total is None else total.add_(part)
                continue
            if total is None:
                total = torch.zeros(handle.num_rows, width, device=self._device)
            total.index_add_(0, sent.places, part[: len(sent.places)].float())
        if total is None:
            total = torch.zeros(handle.num_rows, width, device=self._device)
        return total.to(self._dtype)

    def _gather_pairs(self, handle: RemoteHandle, received: Sequence[Tensor], width: int) -> Tensor:
        """Outputs of all pairs in row-major order [T * k, width]."""
        if len(received) == 1 and handle.sent[0].places is None:
            return received[0]
        shape = (handle.num_rows * handle.bank.top_k, width)
        pairs = torch.empty(shape, dtype=self._dtype, device=self._device)
        for sent, part in zip(handle.sent, received, strict=True):
            if sent.places is not None:
                pairs[sent.places] = part
        return pairs

    def _weigh(self, handle: RemoteHandle, pairs: Tensor) -> Tensor:
        """The sum of the local dispatcher, over the same pairs in the same order."""
        weights = handle.topk_weights.float().flatten()
        rows = torch.arange(len(pairs), device=pairs.device) // handle.bank.top_k
        float32_weights = handle.bank.float32_weights
        total = weighted_sum(pairs, weights, rows, handle.num_rows, float32_weights)
        return total.to(self._dtype)


def _with_weights(slots: Tensor, topk_weights: Tensor) -> Tensor:
    """[ranks, T, k] int32 slots and [T, k] weights -> [ranks, T, 2k] int32."""
    bits = topk_weights.float().contiguous().view(torch.int32)
    return torch.cat((slots, bits.expand(slots.shape)), dim=2)


def _with_empty_rows(
    meta: Tensor, rows: Tensor, count: int, inputs: int = 1
) -> tuple[Tensor, Tensor]:
    """``count`` rows without a request behind the others, with so many inputs each.

    A request ended between the proposal and the header, or a bucket is filled up. meta
    [ranks, n, m], its slots -1 there; rows [.., n * inputs, width].
    """
    if not count:
        return meta, rows
    return F.pad(meta, (0, 0, 0, count), value=-1), F.pad(rows, (0, 0, 0, count * inputs))
