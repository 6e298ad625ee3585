"""The expert side of a step: rows in, one computation for all attention ranks, outputs back."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.config.cluster import CombineMode
from cluster.core.placement import ExpertPlacement
from cluster.core.topology import Generation
from workers.cuda.step_graph import KeptSteps, StepGraph
from workers.dispatch.copies import EpochTables
from workers.dispatch.dispatcher import SlotBank, has_known_sizes, must_wait
from workers.dispatch.native_server import NativeExchange, NativeServer
from workers.dispatch.recording import FixedTables, RecordingTransport
from workers.dispatch.slot_use import (
    DeviceSlotUse,
    FilledSlots,
    SlotNotes,
    UsedSlots,
    joined,
    slot_use,
)
from workers.metrics.activity import Activity
from workers.metrics.padding import PaddingRatio
from workers.metrics.step_metrics import is_measured
from workers.metrics.step_timer import StepTimer
from workers.model.config import BankSpec, ExchangeSpec
from workers.native.exchange import ServerFields
from workers.requests.step_header import StepHeader
from workers.transport.transport import DataTransport, Expected, Part, RowMessage, Tag


@dataclass(frozen=True, slots=True)
class _Batch:
    """The rows of all attention ranks in one exchange, concatenated."""

    ranks: tuple[int, ...]
    counts: tuple[int, ...]
    inputs: Tensor
    """[inputs, in_width] model dtype."""
    used: UsedSlots
    """Of all rows."""
    weights: Tensor | None
    """[rows, k] float32 where the expert side sums."""

    @property
    def slots(self) -> Tensor:
        """[rows, k] int64, -1: not here."""
        return self.used.slots


class _Used(NamedTuple):
    """What an exchange transferred, and what of it this rank used."""

    num_inputs: int
    num_rows: int
    num_rows_here: int
    """Rows with an expert here."""
    num_pairs: int


@dataclass(slots=True)
class CapturedServes:
    """What a captured step of an expert rank on a GPU counts."""

    notes: SlotNotes
    num_bytes: dict[str, int]
    """What each replay adds to those of the server."""


@dataclass(frozen=True, slots=True)
class _CapturedStep:
    graph: StepGraph
    served: CapturedServes


class ExpertServer:
    """Serves the steps of one expert rank. Data thread only."""

    def __init__(
        self,
        transport: DataTransport,
        slots: Sequence[SlotBank],
        banks: Sequence[BankSpec],
        *,
        device_index: int,
        combine_mode: CombineMode,
        dtype: torch.dtype,
        device: torch.device,
        activity: Activity | None = None,
        timer: StepTimer | None = None,
        max_kept_rows: int = 0,
    ) -> None:
        """``slots`` by ``BankSpec.index``; ``device_index`` is this worker's ``Member.device``.

        ``max_kept_rows``: on a GPU, steps are captured where the header has a bucket, and so many
        rows of them are kept; 0: of one step.
        """
        self.timer = timer or StepTimer()
        """Times receive, experts and send."""
        self.num_bytes = {"dispatch": 0, "combine": 0}
        """Bytes of the rows received, and of the outputs sent, since the start."""
        self.slot_seconds = 0.0
        """Time in which activated expert slots were computed; on a GPU kernels run behind it."""
        self._transport = transport
        self._activity = activity or Activity()
        self._slots = slots
        self._banks = tuple(banks)
        self._device_index = device_index
        self._configured_mode = self._combine_mode = combine_mode
        self._dtype = dtype
        self._sums_dtype = dtype if transport.sums_are_rounded else torch.float32
        self._device = device
        self._granted: list[dict[int, int]] = []
        self._native = NativeServer(dtype, self._activity.native_progress)
        self._exact = False
        self._epochs = EpochTables[list[FilledSlots]]()
        self._filled: list[FilledSlots] = []
        self._all_pairs: dict[int, tuple[Tensor, Tensor]] = {}
        self._use = slot_use(device)
        self._has_graphs = device.type == "cuda"
        self._fixed = FixedTables()
        self._kept = KeptSteps[_CapturedStep](max_kept_rows)
        self._is_captured = False
        self._counted = self.num_bytes
        """Where bytes are counted: elsewhere in a step that is captured."""
        self._is_measured = False
        self.padding = PaddingRatio()
        """Padding of the rows from and to the attention ranks, in the steps that are measured."""
        self.token_counts: list[Tensor] = []
        """By bank, [slots] int64 on the CPU: pairs that each expert slot has computed."""

    def set_placement(self, placement: ExpertPlacement, generation: Generation) -> None:
        """Learn which slots are filled in an epoch; those of an older generation are dropped.

        The counters of slots continue.
        """
        experts = [bank.physical_to_logical[self._device_index] for bank in placement.banks]
        tables = [FilledSlots.of(i, slots, self._device) for i, slots in enumerate(experts)]
        self._epochs.add(generation.number, placement.epoch, tables)
        self._combine_mode = "per_slot" if generation.returns_slots else self._configured_mode
        for i, held in enumerate(experts):
            if i == len(self.token_counts):
                self.token_counts.append(torch.zeros(0, dtype=torch.int64))
            missing = len(held) - len(self.token_counts[i])
            if missing > 0:
                self.token_counts[i] = F.pad(self.token_counts[i], (0, missing))

    def stats(self) -> dict[str, float]:
        """Counters of tokens, bytes and padding by metric name without prefix.

        Tokens are pairs of a row and an expert.
        """
        num_tokens = sum(int(counts.sum()) for counts in self.token_counts)
        return {
            "expert_worker_tokens_total": float(num_tokens),
            **{
                f'dispatch_bytes_total{{direction="{direction}"}}': float(count)
                for direction, count in self.num_bytes.items()
            },
            **({} if self._has_graphs else {"expert_worker_slot_seconds_total": self.slot_seconds}),
            **self.padding.stats(),
        }

    @torch.inference_mode()
    def run_step(self, header: StepHeader) -> None:
        """Serve all banks and exchanges of a step, in the global order.

        Raises ``PeerLostError`` and ``GenerationChangedError``.
        """
        self.begin_step(header)
        if self._has_graphs and has_known_sizes(header, self._banks, self._combine_mode):
            self._replay(header)
            return
        places = [
            (bank, exchange.index, micro_batch)
            for bank in self._banks
            for exchange in bank.exchanges
            for micro_batch, granted in enumerate(self._granted)
            if granted
        ]
        self._prepare_native(places)
        served = 0
        while served < len(places):
            self.timer.mark()
            first, served = served, self._native.serve(served)
            for place, fields in zip(
                places[first:served], self._native.fields[first:], strict=False
            ):
                self._note(*place, fields)
            if served < len(places):
                self._serve(*places[served])
                served += 1
        self._end_step()

    def _prepare_native(self, places: Sequence[tuple[BankSpec, int, int]]) -> None:
        """Let native code serve the exchanges of a step if all of them can be."""
        ranks = tuple(self._granted[0])
        exchanges = []
        for bank, exchange, micro_batch in places if not self._exact else ():
            experts = self._slots[bank.index].native(exchange)
            if experts is None:
                break
            filled, counts = self._filled[bank.index].table[:-1], self.token_counts[bank.index]
            by_pair = bank.exchanges[exchange].returns_pairs(self._combine_mode)
            exchanges.append(
                NativeExchange(bank, exchange, micro_batch, experts, filled, counts, by_pair)
            )
        is_native = len(exchanges) == len(places)
        direct = self._transport.direct(ranks) if is_native else None
        rows = [[granted.get(rank, 0) for rank in ranks] for granted in self._granted]
        self._native.begin_step(direct, rows, exchanges)

    def _note(self, bank: BankSpec, exchange: int, micro_batch: int, served: ServerFields) -> None:
        """Count what native code has served."""
        self.num_bytes["dispatch"] += served.received_bytes
        self.num_bytes["combine"] += served.sent_bytes
        self.slot_seconds += (served.computed_ns - served.received_ns) / 1e9
        ends_ns = {"receive": served.received_ns, "experts": served.computed_ns}
        self.timer.passed({**ends_ns, "send": served.sent_ns}, bank, exchange, micro_batch)
        if self._is_measured:
            rows, num_inputs = served.num_rows, served.exchange.num_inputs
            used = _Used(rows * num_inputs, rows, served.num_rows_here, served.num_pairs)
            self._add_padding(bank.exchanges[exchange], used, bool(served.exchange.by_pair))

    def begin_step(self, header: StepHeader) -> None:
        """Start a step whose exchanges are served one by one.

        Raises ``ProtocolError`` for an unknown epoch.
        """
        self.timer.begin_step(header)
        with self._activity:
            self._transport.begin_step(header)
        self._is_measured = is_measured(header)
        self._begin_exchanges(header)

    def _begin_exchanges(self, header: StepHeader) -> None:
        self._use.begin(self.token_counts)
        self._filled = self._epochs.begin_step(header)
        if self._has_graphs:
            tables = self._fixed.copy_in([filled.table for filled in self._filled])
            pairs = zip(self._filled, tables, strict=True)
            self._filled = [replace(filled, table=table) for filled, table in pairs]
        self._exact = header.exact
        self._must_wait = must_wait(header, self._banks, self._combine_mode)
        self._granted = [
            {rank: n for rank, _ in header.grants if (n := header.edge_rows(rank, micro_batch))}
            for micro_batch in range(header.num_micro_batches)
        ]

    def serve(self, bank: int, exchange: int) -> None:
        """Serve the micro-batches of one exchange; raises as ``run_step``."""
        for micro_batch, granted in enumerate(self._granted):
            if granted:
                self.timer.mark()
                self._serve(self._banks[bank], exchange, micro_batch)
        if (bank, exchange) == (len(self._banks) - 1, len(self._banks[bank].exchanges) - 1):
            self._end_step()

    @property
    def captured_state(self) -> Hashable:
        """Where this changes, captured steps are of no use."""
        return self._fixed.version, *(bank.version for bank in self._slots)

    def captured_shape(self, header: StepHeader) -> tuple[tuple[int, ...], ...]:
        """Of all attention ranks: the rank, and its rows by micro-batch."""
        parts = range(header.num_micro_batches)
        return tuple((r, *(header.edge_rows(r, part) for part in parts)) for r, _ in header.grants)

    def _replay(self, header: StepHeader) -> None:
        """Serve a whole step as it was captured."""
        self._kept.keep_only(self.captured_state)
        num_rows = sum(sum(granted.values()) for granted in self._granted)
        step = self._kept.get(
            self.captured_shape(header), num_rows, lambda pool: self._capture(header, pool)
        )
        step.graph.replay()
        self._count(step.served)
        self._end_step()

    def _capture(self, header: StepHeader, pool: Any) -> _CapturedStep:
        """Capture a step, after one that compiles and allocates."""
        self._compute_captured(header, None)
        graph = StepGraph(self._device, pool)
        with graph.capture():
            served = self._compute_captured(header, graph)
        return _CapturedStep(graph, served)

    def _compute_captured(self, header: StepHeader, graph: StepGraph | None) -> CapturedServes:
        live = self._transport
        self._transport = RecordingTransport(live, self._device, self._activity, graph)
        try:
            with self.counting_apart(header) as served:
                for bank in self._banks:
                    for exchange in bank.exchanges:
                        self.serve(bank.index, exchange.index)
        finally:
            self._transport = live
        return served

    @contextmanager
    def counting_apart(self, header: StepHeader) -> Iterator[CapturedServes]:
        """On a GPU: the step whose exchanges are served within it is captured, and not counted."""
        assert isinstance(self._use, DeviceSlotUse)
        num_bytes = dict.fromkeys(self.num_bytes, 0)
        self._begin_exchanges(header)
        self.timer.pause()
        self._is_measured = self._must_wait = False
        self._is_captured, self._counted = True, num_bytes
        try:
            yield CapturedServes(self._use.notes, num_bytes)
        finally:
            self._is_captured, self._counted = False, self.num_bytes

    def replayed(self, captured: CapturedServes) -> None:
        """A captured step was replayed; ``end_replay`` follows."""
        self._count(captured).copy()

    def _count(self, captured: CapturedServes) -> DeviceSlotUse:
        assert isinstance(self._use, DeviceSlotUse)
        self._use.notes = captured.notes
        for name, count in captured.num_bytes.items():
            self.num_bytes[name] += count
        return self._use

    def end_replay(self) -> None:
        """Count, and raise what was put off; the host has waited for what came after the replay."""
        self._use.end(self.token_counts, self._transport.reject)

    def _end_step(self) -> None:
        """All exchanges are served: count, and raise what was put off."""
        if self._is_captured:
            return
        with self._activity:
            self._transport.finish_step()
        self._use.end(self.token_counts, self._transport.reject)

    def _serve(self, bank: BankSpec, index: int, micro_batch: int) -> None:
        """Serve one exchange."""
        exchange, granted = bank.exchanges[index], self._granted[micro_batch]
        by_pair = exchange.returns_pairs(self._combine_mode)
        meta = Part(bank.top_k if by_pair else 2 * bank.top_k, torch.int32)
        parts = (meta, Part(exchange.in_width, self._dtype))
        inputs = bank.top_k if exchange.per_slot_input else 1
        expected = [Expected(r, parts, (n, n * inputs)) for r, n in granted.items()]
        place = (bank, exchange.index, micro_batch)
        tag = Tag(bank.index, exchange.index, micro_batch, "rows")
        with self._activity:
            received = self._transport.receive(
                tag, expected, sized=self._exact, must_wait=self._must_wait
            )
        self._counted["dispatch"] += sum(part.nbytes for parts in received for part in parts)
        self.timer.lap("receive", *place)
        started = time.monotonic()
        batch = self._join(bank, exchange, tuple(granted), received)
        if by_pair:
            outputs, sizes = self._compute(bank, exchange, batch), self._pairs_by_rank(batch)
        else:
            outputs, sizes = self._sum(bank, exchange, batch), batch.counts
        chunks = torch.split_with_sizes(outputs, list(sizes)) if len(sizes) > 1 else (outputs,)
        replies = [
            RowMessage(rank, (chunk,))
            for rank, chunk, size in zip(batch.ranks, chunks, sizes, strict=True)
            if size
        ]
        tag = Tag(bank.index, exchange.index, micro_batch, "outputs")
        self.slot_seconds += time.monotonic() - started
        self.timer.lap("experts", *place)
        with self._activity:  # the buffers may be full
            self._transport.post(tag, replies, sized=False)
        self._counted["combine"] += sum(part.nbytes for m in replies for part in m.parts)
        self.timer.lap("send", *place)
        self._use.count(self._filled[bank.index], batch.slots)
        if self._exact:  # the slots of many rows are not kept
            self._use.flush(self.token_counts)
        if self._is_measured:
            self._measure_padding(exchange, batch, by_pair)

    def _join(
        self,
        bank: BankSpec,
        exchange: ExchangeSpec,
        ranks: tuple[int, ...],
        received: Sequence[tuple[Tensor, ...]],
    ) -> _Batch:
        """Concatenate and check the received rows."""
        metas = [meta for meta, _ in received]
        rows = [inputs for _, inputs in received]
        counts = tuple(m.shape[0] for m in metas)
        filled, top_k = self._filled[bank.index], bank.top_k
        slots = [meta[:, :top_k].long() for meta in metas]
        weights = [meta[:, top_k:].view(torch.float32) for meta in metas]
        batch = _Batch(
            ranks=ranks,
            counts=counts,
            inputs=joined(rows),
            used=self._use.check(filled, ranks, slots, self._transport.reject),
            weights=joined(weights) if weights[0].shape[1] else None,
        )
        if self._exact:
            wanted = self._pairs_by_rank(batch) if exchange.per_slot_input else counts
            for rank, inputs, number in zip(ranks, rows, wanted, strict=True):
                if inputs.shape[0] != number:
                    self._transport.reject(rank, f"{inputs.shape[0]} input rows: must be {number}")
        return batch

    def _pairs(self, slots: Tensor, all_here: bool) -> tuple[Tensor, Tensor]:
        """Places in the flattened ``slots`` of the pairs for this rank, ascending, and their rows;
        those of whole batches are cached.
        """
        top_k = slots.shape[1]
        if not all_here:
            pairs = (slots.flatten() >= 0).nonzero().squeeze(1)  # device-to-host sync
            return pairs, pairs // top_k
        known = self._all_pairs.get(top_k)
        num_pairs = slots.numel()
        if known is None or known[0].shape[0] < num_pairs:
            pairs = torch.arange(num_pairs, device=self._device)
            known = self._all_pairs[top_k] = (pairs, pairs // top_k)
        return known[0][:num_pairs], known[1][:num_pairs]

    def _compute(self, bank: BankSpec, exchange: ExchangeSpec, batch: _Batch) -> Tensor:
        """[P, out_width] outputs of the pairs for this rank."""
        if not batch.used.any_here:
            return torch.empty(0, exchange.out_width, dtype=self._dtype, device=self._device)
        pairs, pair_input = self._pairs(batch.slots, batch.used.all_here)
        if exchange.per_slot_input:
            is_exact, count = self._exact, pairs.shape[0]
            pair_input = torch.arange(count, device=self._device) if is_exact else pairs
        flat = batch.slots.flatten()
        pair_slot = flat if batch.used.all_here else flat[pairs]
        return self._slots[bank.index].compute(exchange.index, batch.inputs, pair_input, pair_slot)

    def _sum(self, bank: BankSpec, exchange: ExchangeSpec, batch: _Batch) -> Tensor:
        """[rows, out_width] weighted partial sums."""
        assert batch.weights is not None
        if not batch.used.any_here:
            shape = batch.slots.shape[0], exchange.out_width
            return torch.zeros(shape, dtype=self._sums_dtype, device=self._device)
        return self._slots[bank.index].compute_rows(
            exchange.index, batch.inputs, batch.slots, batch.weights, self._sums_dtype
        )

    def _measure_padding(self, exchange: ExchangeSpec, batch: _Batch, by_pair: bool) -> None:
        """Count the transferred rows without use; outputs by pair are all used."""
        num_rows = batch.slots.shape[0]
        # device-to-host sync unless all rows are here
        num_here = num_rows if batch.used.all_here else int((batch.slots >= 0).any(1).sum())
        num_pairs = sum(self._pairs_by_rank(batch))
        used = _Used(batch.inputs.shape[0], num_rows, num_here, num_pairs)
        self._add_padding(exchange, used, by_pair)

    def _add_padding(self, exchange: ExchangeSpec, used: _Used, by_pair: bool) -> None:
        num_used = used.num_pairs if exchange.per_slot_input else used.num_rows_here
        self.padding.add("dispatch", used.num_inputs, num_used)
        if by_pair:
            self.padding.add("combine", used.num_pairs, used.num_pairs)
        else:
            self.padding.add("combine", used.num_rows, used.num_rows_here)

    def _pairs_by_rank(self, batch: _Batch) -> tuple[int, ...]:
        if batch.used.all_here:
            return tuple(n * batch.slots.shape[1] for n in batch.counts)
        here = batch.slots >= 0
        return tuple(int(part.sum()) for part in torch.split_with_sizes(here, list(batch.counts)))
