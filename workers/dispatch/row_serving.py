"""Expert side of exchanges: receives rows over a transport, computes them, returns outputs.

The rows of all attention ranks are computed together. ``row_exchange``, the attention side,
documents the parts of the messages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from cluster.config.cluster import CombineMode
from cluster.core.group_placement import PART_ROWS_PER_EXPERT
from workers.dispatch.dispatcher import SlotBank
from workers.dispatch.expert_counters import ExpertCounters, ReceivedRows, UsedRows
from workers.dispatch.slot_checker import FilledSlots, SlotChecker, UsedSlots, joined
from workers.metrics.activity import Activity
from workers.metrics.step_timer import StepTimer
from workers.model.config import BankSpec, ExchangeSpec
from workers.requests.step_header import StepHeader
from workers.transport.transport import DataTransport, ExpectedMessage, PartShape, RowMessage, Tag


class Interleaving(NamedTuple):
    """How an expert worker serves other step groups between parts of an exchange."""

    is_needed: Callable[[], bool]
    """Returns whether an exchange is divided into parts, as another group runs a step."""
    serve_others: Callable[[], None]


@dataclass(frozen=True, slots=True)
class ExpertSide:
    """Objects that all ``RowServing`` objects of one expert rank share."""

    banks: tuple[BankSpec, ...]
    slots: Sequence[SlotBank]
    """Expert slots by ``BankSpec.index``."""
    dtype: torch.dtype
    device: torch.device
    activity: Activity
    counters: ExpertCounters
    checker: SlotChecker


def part_rows(bank: BankSpec) -> int:
    """Return the number of rows of a part of an exchange."""
    return max(1, PART_ROWS_PER_EXPERT * bank.num_experts // bank.top_k)


class ServedPlace(NamedTuple):
    """One exchange of one micro-batch in a step, which an expert rank serves."""

    bank: BankSpec
    exchange: int
    micro_batch: int


@dataclass(frozen=True, slots=True)
class ServedStep:
    """Description of a step for the expert rank that serves it."""

    header: StepHeader
    combine_mode: CombineMode
    filled: Sequence[FilledSlots]
    """For each bank, the slots that hold an expert in the step's epoch."""
    granted: Sequence[dict[int, int]]
    """For each micro-batch, the number of rows that each attention rank sends, or at most sends if
    ``StepHeader.exact``; ranks without rows are left out."""
    num_bytes: dict[str, int]
    """Counters of the bytes of ``dispatch`` and ``combine``, to which the step adds."""
    timer: StepTimer
    """Timer of the laps ``receive``, ``experts`` and ``send``."""
    must_wait: bool
    is_measured: bool
    """Whether the host measures padding; on a GPU, the device does in every step."""

    def places(self, banks: Sequence[BankSpec]) -> list[ServedPlace]:
        """Return all exchanges of the step that have rows, in the global order (bank, exchange,
        micro-batch)."""
        return [
            ServedPlace(bank, exchange.index, micro_batch)
            for bank in banks
            for exchange in bank.exchanges
            for micro_batch, granted in enumerate(self.granted)
            if granted
        ]


class RowServing(Protocol):
    """Receives the rows of exchanges, computes them in the expert slots, and returns outputs."""

    def begin_step(self, step: ServedStep, places: Sequence[ServedPlace]) -> None:
        """Begin a step. ``places``: the exchanges to serve, in order."""

    def serve(self, first: int) -> int:
        """Serve one or more exchanges from index ``first`` of ``places`` on.

        Returns the index of the first unserved exchange. Raises ``PeerLostError`` and
        ``GenerationChangedError``.
        """


@dataclass(frozen=True, slots=True)
class _Batch:
    """The rows of all attention ranks in one exchange, concatenated."""

    ranks: tuple[int, ...]
    counts: tuple[int, ...]
    inputs: Tensor
    """Inputs of the experts, [inputs, in_width] in the model dtype."""
    used: UsedSlots
    """Validated expert slots of all rows."""
    weights: Tensor | None
    """Routing weights, [rows, k] float32, if the expert side computes weighted sums, else None."""

    @property
    def slots(self) -> Tensor:
        """Slots of each row on this rank, [rows, k] int64; -1 for experts of another rank."""
        return self.used.slots

    def pairs_by_rank(self) -> tuple[int, ...]:
        """Return for each attention rank how many of its (row, expert) pairs this rank computes."""
        if self.used.all_here:
            return tuple(n * self.slots.shape[1] for n in self.counts)
        here = self.slots >= 0
        return tuple(int(part.sum()) for part in torch.split_with_sizes(here, list(self.counts)))


class StaticServing:
    """Serves exchanges in which attention ranks send as many rows as the header states."""

    is_sized: ClassVar[bool] = False
    """Whether received messages carry their row counts, because the header does not give them."""

    def __init__(self, side: ExpertSide, transport: DataTransport) -> None:
        self.interleaving: Interleaving | None = None
        """Serves other step groups between parts of an exchange, if not None."""
        self._side = side
        self._transport = transport
        self._sums_dtype = side.dtype if transport.sums_are_rounded else torch.float32
        self._step: ServedStep | None = None
        self._places: Sequence[ServedPlace] = ()
        self._others_s = 0.0
        """Seconds in which other step groups were served during the current exchange."""
        self._all_pairs: dict[int, tuple[Tensor, Tensor]] = {}

    def begin_step(self, step: ServedStep, places: Sequence[ServedPlace]) -> None:
        """Begin a step. ``places``: all exchanges to serve with ``serve``, in order."""
        self._step, self._places = step, places

    def serve(self, first: int) -> int:
        """Serve the exchange with index ``first``; return the next index.

        Raises ``PeerLostError`` and ``GenerationChangedError``.
        """
        self.serve_place(self._places[first])
        return first + 1

    def serve_place(self, place: ServedPlace) -> None:
        """Serve one exchange: receive rows, compute them, return the outputs.

        Raises ``PeerLostError`` and ``GenerationChangedError``.
        """
        step, side = self._step, self._side
        assert step is not None, "begin_step was not called"
        bank, index, micro_batch = place
        exchange, granted = bank.exchanges[index], step.granted[micro_batch]
        by_pair = exchange.returns_pairs(step.combine_mode)
        meta = PartShape(bank.top_k if by_pair else 2 * bank.top_k, torch.int32)
        parts = (meta, PartShape(exchange.in_width, side.dtype))
        inputs = bank.top_k if exchange.per_slot_input else 1
        expected = [ExpectedMessage(r, parts, (n, n * inputs)) for r, n in granted.items()]
        tag = Tag(bank.index, exchange.index, micro_batch, "rows")
        with side.activity:
            received = self._transport.receive(
                tag, expected, sized=self.is_sized, must_wait=step.must_wait
            )
        step.num_bytes["dispatch"] += sum(part.nbytes for parts in received for part in parts)
        step.timer.lap("receive", *place)
        started, self._others_s = time.monotonic(), 0.0
        filled = step.filled[bank.index]
        batch = self._join(filled, bank.top_k, exchange, tuple(granted), received)
        if by_pair:
            outputs, sizes = self._compute(bank, exchange, batch), batch.pairs_by_rank()
        else:
            outputs, sizes = self._sum(bank, exchange, batch), batch.counts
        chunks = torch.split_with_sizes(outputs, list(sizes)) if len(sizes) > 1 else (outputs,)
        replies = [
            RowMessage(rank, (chunk,))
            for rank, chunk, size in zip(batch.ranks, chunks, sizes, strict=True)
            if size
        ]
        tag = Tag(bank.index, exchange.index, micro_batch, "outputs")
        side.counters.slot_seconds += time.monotonic() - started - self._others_s
        step.timer.lap("experts", *place)
        with side.activity:  # the buffers may be full
            self._transport.post(tag, replies, sized=False)
        step.num_bytes["combine"] += sum(part.nbytes for m in replies for part in m.parts)
        step.timer.lap("send", *place)
        rows = ReceivedRows(exchange, len(batch.inputs), len(batch.slots), by_pair)
        self._count(filled, batch, rows)
        if step.is_measured:
            self._measure_padding(batch, rows)

    def _join(
        self,
        filled: FilledSlots,
        top_k: int,
        exchange: ExchangeSpec,
        ranks: tuple[int, ...],
        received: Sequence[tuple[Tensor, ...]],
    ) -> _Batch:
        """Concatenate and validate the received rows of all attention ranks."""
        metas = [meta for meta, _ in received]
        rows = [inputs for _, inputs in received]
        slots = [meta[:, :top_k] for meta in metas]
        weights = [meta[:, top_k:].view(torch.float32) for meta in metas]
        batch = _Batch(
            ranks=ranks,
            counts=tuple(m.shape[0] for m in metas),
            inputs=joined(rows),
            used=self._side.checker.check(filled, ranks, slots, self._transport.reject),
            weights=joined(weights) if weights[0].shape[1] else None,
        )
        self._check_inputs(exchange, batch, rows)
        return batch

    def _check_inputs(self, exchange: ExchangeSpec, batch: _Batch, rows: Sequence[Tensor]) -> None:
        """Do nothing: the transport has compared the number of inputs with the header."""

    def _count(self, filled: FilledSlots, batch: _Batch, rows: ReceivedRows) -> None:
        self._side.checker.count(filled, batch.slots, rows)

    def _pairs(self, slots: Tensor, all_here: bool) -> tuple[Tensor, Tensor]:
        """Return the indices of this rank's (row, slot) pairs, and the row of each pair.

        Indices are in flattened ``slots`` [rows, k], ascending. If all pairs belong to this rank
        (``all_here``), the result is cached.
        """
        top_k = slots.shape[1]
        if not all_here:
            pairs = (slots.flatten() >= 0).nonzero().squeeze(1)  # device-to-host sync
            return pairs, pairs // top_k
        known = self._all_pairs.get(top_k)
        num_pairs = slots.numel()
        if known is None or known[0].shape[0] < num_pairs:
            pairs = torch.arange(num_pairs, device=self._side.device)
            known = self._all_pairs[top_k] = (pairs, pairs // top_k)
        return known[0][:num_pairs], known[1][:num_pairs]

    def _compute(self, bank: BankSpec, exchange: ExchangeSpec, batch: _Batch) -> Tensor:
        """Return the expert outputs of this rank's (row, slot) pairs, [P, out_width]."""
        side = self._side
        if not batch.used.any_here:
            return torch.empty(0, exchange.out_width, dtype=side.dtype, device=side.device)
        pairs, pair_input = self._pairs(batch.slots, batch.used.all_here)
        if exchange.per_slot_input:
            pair_input = self._inputs_of(pairs)
        flat = batch.slots.flatten()
        pair_slot = flat if batch.used.all_here else flat[pairs]
        compute = partial(side.slots[bank.index].compute, exchange.index, batch.inputs)
        size = part_rows(bank) * bank.top_k
        if not self._is_divided(len(pairs), size):
            return compute(pair_input, pair_slot)
        parts = list(zip(torch.split(pair_input, size), torch.split(pair_slot, size), strict=True))
        return self._in_parts(lambda i: compute(*parts[i]), len(parts))

    def _inputs_of(self, pairs: Tensor) -> Tensor:
        """Return the index of each pair's input, if each (row, slot) pair has its own input."""
        return pairs

    def _sum(self, bank: BankSpec, exchange: ExchangeSpec, batch: _Batch) -> Tensor:
        """Return for each row the weighted sum over this rank's experts, [rows, out_width]."""
        assert batch.weights is not None
        if not batch.used.any_here:
            shape = batch.slots.shape[0], exchange.out_width
            return torch.zeros(shape, dtype=self._sums_dtype, device=self._side.device)
        tensors = batch.inputs, batch.slots, batch.weights
        compute = partial(self._side.slots[bank.index].compute_rows, exchange.index)
        size = part_rows(bank)
        if exchange.per_slot_input or not self._is_divided(len(batch.slots), size):
            return compute(*tensors, self._sums_dtype)
        parts = list(zip(*(torch.split(own, size) for own in tensors), strict=True))

        def sums(i: int) -> Tensor:
            rows, slots, weights = parts[i]
            if batch.used.all_here or bool((slots >= 0).any()):
                return compute(rows, slots, weights, self._sums_dtype)
            return torch.zeros(len(rows), exchange.out_width, dtype=self._sums_dtype)

        return self._in_parts(sums, len(parts))

    def _is_divided(self, number: int, size: int) -> bool:
        """Whether ``number`` rows or pairs are computed in parts of ``size``."""
        return number > size and self.interleaving is not None and self.interleaving.is_needed()

    def _in_parts(self, compute: Callable[[int], Tensor], number: int) -> Tensor:
        """Return the outputs of all parts of an exchange; serve other step groups between them."""
        outputs = [compute(0)]
        for index in range(1, number):
            began = time.monotonic()
            if self.interleaving is not None:
                self.interleaving.serve_others()
            self._others_s += time.monotonic() - began
            outputs.append(compute(index))
        return torch.cat(outputs)

    def _measure_padding(self, batch: _Batch, rows: ReceivedRows) -> None:
        is_all = batch.used.all_here
        num_here = rows.num_rows if is_all else int((batch.slots >= 0).any(1).sum())
        self._side.counters.add_padding(rows, UsedRows(num_here, sum(batch.pairs_by_rank())))


class ExactServing(StaticServing):
    """Serves exchanges in which attention ranks send counts and only the rows for this rank."""

    is_sized = True

    def _check_inputs(self, exchange: ExchangeSpec, batch: _Batch, rows: Sequence[Tensor]) -> None:
        wanted = batch.pairs_by_rank() if exchange.per_slot_input else batch.counts
        for rank, inputs, number in zip(batch.ranks, rows, wanted, strict=True):
            if inputs.shape[0] != number:
                self._transport.reject(rank, f"{inputs.shape[0]} input rows: must be {number}")

    def _inputs_of(self, pairs: Tensor) -> Tensor:
        return torch.arange(pairs.shape[0], device=self._side.device)

    def _count(self, filled: FilledSlots, batch: _Batch, rows: ReceivedRows) -> None:
        super()._count(filled, batch, rows)
        self._side.checker.flush()  # frees the slots of many rows
