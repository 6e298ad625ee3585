"""One step of the model: from planned rows to the final hidden states of each of them.

The runner drives one generator per micro-batch (see ``layers``): whatever a layer yields is
dispatched, and the generator is resumed with what ``combine`` brings home. It changes nothing but
the KV of the rows it runs, which nobody reads before the step is committed.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.attention import (
    AttentionBatch,
    DecodeGroup,
    PrefillChunk,
    chunk_mask,
    group_size,
    runs,
)
from workers.capture import BatchRecorder, Capture
from workers.dist.dispatcher import BatchRows, DispatchHandle, TokenDispatcher
from workers.dist.header import StepHeader
from workers.families.base import BankSpec
from workers.kv_cache import KVCache
from workers.layers import AttentionModel, Exchange, LayerSteps, ModelInputs, Recorder
from workers.load_counter import Routed
from workers.scheduler import Plan, PlannedRows
from workers.sequence import Sequence as RequestSequence

_KEY_STEP = 0x9E3779B97F4A7C15
_KEY_MASK = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring rows of one sequence in the flat batch."""

    planned: PlannedRows
    """The planned rows that these are, or are a part of."""
    first: int
    """Position of the first row."""
    count: int
    """Rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What the model made of a plan."""

    hidden: Tensor
    """[num_rows, hidden_size] after the final norm."""
    first_row: tuple[int, ...]
    """Row of ``hidden`` where each entry of ``plan.rows`` begins."""
    finite: tuple[bool, ...]
    """For each entry of ``plan.rows``: no NaN or infinity in its rows."""
    routed: tuple[tuple[Routed, ...], ...]
    """[bank][micro-batch]: the experts that were chosen."""
    first_dispatch: float | None
    """Monotonic seconds of the step's first dispatch; None when there was none."""
    captures: Mapping[RequestSequence, Sequence[Capture]]
    """What was recorded for sequences whose requests look inside the model."""


class ModelRunner:
    """Runs plans on one attention rank, with whatever dispatcher leads to the experts."""

    def __init__(
        self,
        *,
        model: AttentionModel,
        cache: KVCache,
        banks: Sequence[BankSpec],
        dispatcher: TokenDispatcher,
        rank: int = 0,
    ) -> None:
        self._model = model
        self._cache = cache
        self._banks = tuple(banks)
        self._dispatcher = dispatcher
        self._rank = rank
        self._first_dispatch: float | None = None
        self.recorder: Recorder | None = None
        """Sees hidden states and routers of steps with one micro-batch; for tests."""

    @property
    def first_dispatch(self) -> float | None:
        """Monotonic seconds of the latest step's first dispatch, also when the step failed."""
        return self._first_dispatch

    def run(self, header: StepHeader, plan: Plan) -> StepResult | None:
        """Run a plan; None when it has no rows. Raises ``TransportError``.

        Takes part in every exchange of a micro-batch that was granted rows, even if the plan has
        fewer rows than granted, or none.
        """
        self._first_dispatch = None
        if not header.grant(self._rank).num_rows:
            assert not plan.rows, "rows without a grant"
            self._dispatcher.sit_out(header)
            return None
        order = sorted(range(len(plan.rows)), key=lambda i: self._place(plan.rows[i]))
        spans = [Span(p, p.first, p.count) for p in (plan.rows[i] for i in order)]
        parts = _split(spans, header.rows(self._rank, 0))[: header.num_micro_batches]
        batches = [_Batch(part, self._cache, self._model.device) for part in parts]
        self._dispatcher.begin_step(header, [b.rows for b in batches])
        routed: list[list[Routed]] = [[] for _ in self._banks]
        hidden = self._drive(batches, routed)
        if not plan.rows:
            return None
        joined = hidden[0] if len(hidden) == 1 else torch.cat([h for h in hidden if len(h)])
        captures: dict[RequestSequence, list[Capture]] = {}
        for batch in batches:
            for sequence, capture in batch.captures:
                captures.setdefault(sequence, []).append(capture)
        return self._result(joined, plan, order, routed, captures)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden_size] -> [rows, vocab_size], model dtype."""
        return self._model.logits(hidden)

    def _place(self, planned: PlannedRows) -> tuple[int, int]:
        """Decodes come first, those of about the same length together."""
        if not planned.is_decode:
            return (1, 0)
        return (0, group_size(len(planned.sequence.blocks)))

    def _flow(self, batch: _Batch) -> LayerSteps:
        if batch.inputs is None:
            return _idle(self._banks, self._model)
        recorder = batch.recorder or self.recorder
        return self._model.forward(batch.inputs, self._cache.layers, recorder)

    def _drive(self, batches: Sequence[_Batch], routed: list[list[Routed]]) -> list[Tensor]:
        """Resume the micro-batches in turn until all have ended; returns their hidden states.

        With two, the experts work on one while the other is in attention here:
        dispatch(l, 0), dispatch(l, 1), combine(l, 0), dispatch(l+1, 0), combine(l, 1), ..
        """
        flows = [self._flow(batch) for batch in batches]
        handles: list[DispatchHandle | None] = [None] * len(flows)
        results: list[Tensor] = []
        while len(results) < len(flows):
            for micro_batch, flow in enumerate(flows):
                handle = handles[micro_batch]
                try:
                    if handle is None:
                        exchange = next(flow)
                    else:
                        exchange = flow.send(self._dispatcher.combine(handle))
                except StopIteration as stop:
                    results.append(stop.value)
                    continue
                handles[micro_batch] = handle = self._dispatch(exchange, micro_batch)
                if exchange.exchange == 0:
                    num_decodes = batches[micro_batch].num_decodes
                    chosen = Routed(exchange.topk_ids, handle.copies, num_decodes)
                    routed[exchange.bank].append(chosen)
        return results

    def _dispatch(self, exchange: Exchange, micro_batch: int) -> DispatchHandle:
        if self._first_dispatch is None:
            self._first_dispatch = time.monotonic()
        handle = self._dispatcher.dispatch(
            exchange.rows,
            exchange.topk_ids,
            exchange.topk_weights,
            exchange.bank,
            exchange.exchange,
            micro_batch,
        )
        if exchange.aside is not None:
            exchange.aside.result()
        return handle

    def _result(
        self,
        hidden: Tensor,
        plan: Plan,
        order: Sequence[int],
        routed: list[list[Routed]],
        captures: Mapping[RequestSequence, Sequence[Capture]],
    ) -> StepResult:
        bad_rows = (~torch.isfinite(hidden.sum(-1, dtype=torch.float32))).nonzero()
        bad = set(bad_rows.flatten().tolist())  # device-to-host sync
        first_row = [0] * len(order)
        row = 0
        for i in order:
            first_row[i] = row
            row += plan.rows[i].count
        finite = tuple(
            not bad or bad.isdisjoint(range(first, first + planned.count))
            for first, planned in zip(first_row, plan.rows, strict=True)
        )
        return StepResult(
            hidden=hidden,
            first_row=tuple(first_row),
            finite=finite,
            routed=tuple(map(tuple, routed)),
            first_dispatch=self._first_dispatch,
            captures=captures,
        )


def _idle(banks: Sequence[BankSpec], model: AttentionModel) -> LayerSteps:
    """All exchanges of a step without a row: peers expect them where rows were granted."""
    for bank in banks:
        ids = torch.empty((0, bank.top_k), dtype=torch.int64, device=model.device)
        weights = torch.empty((0, bank.top_k), dtype=model.dtype, device=model.device)
        for spec in bank.exchanges:
            shape = (0, bank.top_k, spec.in_width) if spec.per_slot_input else (0, spec.in_width)
            rows = torch.empty(shape, dtype=model.dtype, device=model.device)
            yield Exchange(bank.index, spec.index, rows, ids, weights)
    return torch.empty((0, 0), dtype=model.dtype, device=model.device)


def _split(spans: Sequence[Span], num_first: int) -> tuple[list[Span], list[Span]]:
    """The first ``num_first`` rows, and the rest."""
    first: list[Span] = []
    second: list[Span] = []
    left = num_first
    for span in spans:
        head = min(left, span.count)
        if head:
            first.append(Span(span.planned, span.first, head))
        if head < span.count:
            second.append(Span(span.planned, span.first + head, span.count - head))
        left -= head
    return first, second


class _Batch:
    """The tensors of one micro-batch. Built on the CPU, moved in one copy."""

    def __init__(self, spans: Sequence[Span], cache: KVCache, device: torch.device) -> None:
        self._device = device
        num_decodes = sum(s.planned.is_decode for s in spans)
        num_rows = sum(s.count for s in spans)
        staging = _Staging()
        for column in _columns(spans, cache.block_size):
            staging.add(column)
        groups = self._stage_decodes(spans[:num_decodes], cache, staging)
        chunks = spans[num_decodes:]
        for span in chunks:
            length = span.first + span.count
            staging.add(_array(span.planned.sequence.blocks[: -(-length // cache.block_size)]))
        tensors = staging.to(device)
        tokens, positions, prompt_lengths, slots, keys = (next(tensors) for _ in range(5))
        self.num_decodes = num_decodes
        self.rows = BatchRows(
            is_prefill=torch.arange(num_rows, device=device) >= num_decodes, row_key=keys
        )
        self.inputs: ModelInputs | None = None
        self.captures = _captures(spans)
        self.recorder = BatchRecorder([c for _, c in self.captures]) if self.captures else None
        if num_rows:
            decodes = tuple(self._decode_group(g, tensors, cache.block_size) for g in groups)
            prefills = tuple(self._chunks(chunks, num_decodes, tensors))
            watcher = self.recorder if self.recorder and self.recorder.wants_maps else None
            attention = AttentionBatch(
                slots, decodes, prefills, cache.workspaces, cache.lanes, watcher
            )
            given = tuple(_given_rows(spans, device))
            self.inputs = ModelInputs(tokens, positions, prompt_lengths, attention, given)

    def _stage_decodes(
        self, spans: Sequence[Span], cache: KVCache, staging: _Staging
    ) -> list[tuple[int, int]]:
        """Add each group's padded block tables and lengths; returns the groups' row ranges."""
        tables = [span.planned.sequence.blocks for span in spans]
        groups = runs([group_size(len(table)) for table in tables], cache.blocks_per_piece)
        for first, last in groups:
            width = group_size(len(tables[first]))
            padded = np.full((last - first, width), cache.null_block, dtype=np.int64)
            for row, table in zip(padded, tables[first:last], strict=True):
                row[: len(table)] = table
            staging.add(padded.reshape(-1))
            staging.add(_array([span.first + 1 for span in spans[first:last]]))
        return groups

    def _decode_group(
        self, group: tuple[int, int], tensors: Generator[Tensor], block_size: int
    ) -> DecodeGroup:
        first, last = group
        blocks, lengths = next(tensors), next(tensors)
        width = len(blocks) // (last - first) * block_size
        unseen = torch.arange(width, device=self._device) >= lengths.unsqueeze(1)
        return DecodeGroup(first, last, blocks, unseen)

    def _chunks(
        self, spans: Sequence[Span], first_row: int, tensors: Generator[Tensor]
    ) -> Generator[PrefillChunk]:
        for span in spans:
            last_row = first_row + span.count
            mask = chunk_mask(span.first, span.count, self._device)
            yield PrefillChunk(first_row, last_row, span.first + span.count, next(tensors), mask)
            first_row = last_row


def _given_rows(
    spans: Sequence[Span], device: torch.device
) -> Generator[tuple[int, Tensor], None, None]:
    """See ``ModelInputs.given``."""
    row = 0
    for span in spans:
        embeds = span.planned.sequence.request.prompt_embeds
        last = min(span.first + span.count, span.planned.sequence.prompt_length)
        if embeds is not None and span.first < last:
            yield row, torch.tensor(embeds.rows(span.first, last), device=device)
        row += span.count


def _captures(spans: Sequence[Span]) -> list[tuple[RequestSequence, Capture]]:
    """One for each span whose request looks inside the model."""
    found: list[tuple[RequestSequence, Capture]] = []
    row = 0
    for span in spans:
        inspection = span.planned.sequence.request.inspection
        if inspection is not None and inspection.reads_inside:
            capture = Capture(inspection, span.first, row, span.count)
            found.append((span.planned.sequence, capture))
        row += span.count
    return found


class _Staging:
    """Integer arrays that travel to the device together."""

    def __init__(self) -> None:
        self._arrays: list[NDArray[np.int64]] = []

    def add(self, array: NDArray[np.int64]) -> None:
        self._arrays.append(array)

    def to(self, device: torch.device) -> Generator[Tensor]:
        """The arrays in order, as views of one tensor."""
        joined = torch.from_numpy(np.concatenate(self._arrays)).to(device)
        yield from torch.split(joined, [len(a) for a in self._arrays])


def _array(values: Sequence[int]) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


def _columns(spans: Sequence[Span], block_size: int) -> tuple[NDArray[np.int64], ...]:
    """Token ids, positions, prompt lengths, cache slots and row keys of all rows."""
    tokens: list[int] = []
    positions: list[int] = []
    prompt_lengths: list[int] = []
    slots: list[int] = []
    keys: list[int] = []
    for span in spans:
        sequence, first, last = span.planned.sequence, span.first, span.first + span.count
        tokens += sequence.tokens(first, last)
        positions += range(first, last)
        prompt_lengths += [sequence.prompt_length] * span.count
        for position in range(first, last):
            block, offset = divmod(position, block_size)
            slots.append(sequence.blocks[block] * block_size + offset)
            keys.append((sequence.key ^ (position * _KEY_STEP)) & _KEY_MASK)
    return (_array(tokens), _array(positions), _array(prompt_lengths), _array(slots), _array(keys))
