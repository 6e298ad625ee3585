"""Runs one step of the model: from planned rows to final hidden states of the rows, or to logits.

The runner drives one generator per micro-batch (see ``workers.model.layers``): when a layer yields
rows for the experts, the runner sends them, and resumes the layer with the combined outputs. If
nothing reads values between the layers, native code runs all layers in one call, including the
exchanges. A step changes only the KV of its rows, which no other step reads before the commit.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.dispatch.dispatcher import DispatchHandle, TokenDispatcher
from workers.dispatch.local import LocalDispatcher
from workers.dispatch.remote import RemoteDispatcher
from workers.engine.batch import (
    MicroBatch,
    PlannedBatchRows,
    batch_order,
    has_adapters,
    needs_captures,
    num_decodes,
    split_rows,
)
from workers.engine.decode_graphs import DecodeGraphs
from workers.engine.expert_load import RoutedRows
from workers.engine.native_step import NativeStep, native_step
from workers.engine.step_result import PredictorOutput, StepResult
from workers.inspection.recorder import Capture
from workers.kv.block_tables import BlockTables
from workers.kv.cache import KVCache
from workers.lora.loaded import LoadedAdapters
from workers.model.config import BankSpec
from workers.model.families.native_layers import Experts
from workers.model.host_copies import to_device
from workers.model.layers import AttentionModel, Dispatch, Layer, LayerSteps, ModelInputs
from workers.requests.sequence import SequenceState
from workers.requests.step_header import StepHeader
from workers.sampling.best_tokens import finite_rows
from workers.scheduling.step_plan import PlannedRows, StepPlan, single_rows


@dataclass(frozen=True, slots=True)
class _LayerOutputs:
    """Outputs of the model's layers in a step."""

    hidden: list[Tensor]
    """Final hidden states of each micro-batch, [T, H]."""
    finite: Tensor | None = None
    """Whether each row is free of NaN and infinity, [num_rows] bool; None if not computed."""
    logits: Tensor | None = None
    """Logits of all rows, [num_rows, V]; None if not computed."""
    drawn: Tensor | None = None
    """See ``StepResult.drawn``."""


@dataclass(kw_only=True)
class ModelRunner:
    """Runs the model for the plans of one attention rank, over any ``TokenDispatcher``."""

    model: AttentionModel
    """The attention part of the model; the field may be replaced between steps."""
    cache: KVCache
    tables: BlockTables
    banks: Sequence[BankSpec]
    dispatcher: TokenDispatcher
    rank: int = 0
    first_dispatch: float | None = None
    """Monotonic time of the first dispatch in the latest step, even if the step failed. In a step
    of native code or a CUDA graph: the time at which its layers started. None: no dispatch."""
    on_compute: Callable[[], None] = lambda: None
    """Function that is called in each step at the time of ``first_dispatch``."""
    advance_s: float = 0.1
    """Minimum seconds between two progress reports of native layers, checked after each layer."""
    graphs: DecodeGraphs | None = None
    """CUDA graphs of decode steps; None if steps do not run as graphs."""
    adapters: LoadedAdapters | None = None
    """Loaded LoRA adapters, which rows may use; None if no adapter can be loaded."""
    _parts: Sequence[Sequence[PlannedRows]] = ()
    """Planned rows of each micro-batch of the latest step that ran without a graph."""
    _known: tuple[AttentionModel | None, Sequence[Layer]] = None, ()
    _native_step: NativeStep | None = None
    """Native code for the model in ``_known``; None if a layer of it has no native code."""

    def run(
        self, header: StepHeader, plan: StepPlan, *, is_ahead: bool = False
    ) -> StepResult | None:
        """Run the rows of a plan; return None if it has no rows. Raises ``TransportError``.

        ``is_ahead``: the step before may still run, and a graph can run this step; see
        ``DecodeGraphs.run``.

        Even if the plan has fewer rows than the header grants, or none, this rank takes part in
        every exchange of each micro-batch, as the expert workers expect its message. With a bucket,
        this also applies to a rank without a grant, which sends padding.
        """
        self.first_dispatch = None
        if is_ahead or self._fits_graph(header, plan):
            assert self.graphs is not None
            self.dispatcher.begin_step(header, ())
            self._begin_compute()
            halves = split_rows(single_rows(plan.rows), header.rows(self.rank, 0))
            parts = halves[: header.num_micro_batches]
            output = self.graphs.run(header, parts, is_ahead=is_ahead)
            if not plan.rows:
                self._finish_without_rows()
                return None
            order = list(range(len(plan.rows)))
            captured = _LayerOutputs([output.hidden], None, output.logits, output.drawn)
            return self._result(captured, plan, order, output.routed, {})
        if not header.edge_rows(self.rank, 0):
            assert not plan.rows, "rows without a grant"
            self.dispatcher.run_empty_step(header)
            return None
        order = sorted(range(len(plan.rows)), key=lambda i: batch_order(plan.rows[i]))
        planned = single_rows([plan.rows[i] for i in order])
        parts = split_rows(planned, header.rows(self.rank, 0))[: header.num_micro_batches]
        self._parts = parts
        device = self.model.device
        self.dispatcher.begin_step(header, [PlannedBatchRows(part, device) for part in parts])
        routed: list[list[RoutedRows]] = [[] for _ in self.banks]
        captures: dict[SequenceState, list[Capture]] = {}
        outputs = self._run_native_layers(parts, routed)
        if outputs is None:
            batches = [self._batch(part) for part in parts]
            flows = [self._layer_steps(batch) for batch in batches]
            decodes = [num_decodes(part) for part in parts]
            outputs = _LayerOutputs(self._run_alternately(decodes, routed, flows))
            for batch in batches:
                for sequence, capture in batch.captures:
                    captures.setdefault(sequence, []).append(capture)
        if not plan.rows:
            self._finish_without_rows()
            return None
        return self._result(outputs, plan, order, routed, captures)

    def _finish_without_rows(self) -> None:
        """Wait for the messages of a step, then for the device, from which the host reads nothing
        else. ``TokenDispatcher.end_step`` reads what was copied asynchronously."""
        self.dispatcher.finish_step()
        if self.model.device.type == "cuda":
            torch.cuda.current_stream(self.model.device).synchronize()

    def predict(
        self, result: StepResult | None, next_tokens: NDArray[np.int64]
    ) -> PredictorOutput | None:
        """Run the prediction layer on the outputs of the latest step, which must have granted rows
        or padding.

        ``next_tokens``: token that follows the token of each row, [num_rows] int64. If ``result``
        is None, as the plan has no rows, this rank takes part in the exchanges and returns None.
        Raises ``TransportError``.
        """
        banks = [bank for bank in self.banks if self._is_predictor_bank(bank)]
        routed: list[list[RoutedRows]] = [[] for _ in self.banks]
        flows, row = [], 0
        for part in self._parts:
            count = sum(rows.count for rows in part)
            if not count or result is None:
                flows.append(_run_empty_exchanges(banks, self.model))
                continue
            hidden, tokens = result.hidden[row : row + count], next_tokens[row : row + count]
            flows.append(self._predictor_layers(part, hidden, torch.from_numpy(tokens)))
            row += count
        outputs = self._run_alternately([num_decodes(part) for part in self._parts], routed, flows)
        self.dispatcher.finish_step()
        if result is None:
            return None
        known = ((*a, *b) for a, b in zip(result.routed, routed, strict=True))
        return PredictorOutput(_concatenated(outputs), tuple(known))

    def _predictor_layers(
        self, part: Sequence[PlannedRows], hidden: Tensor, tokens: Tensor
    ) -> LayerSteps:
        """Return the generator of the prediction layer for the rows of a micro-batch."""
        model, cache = self.model, self.cache.predictor
        inputs = self._batch(part).inputs
        assert inputs is not None, "the micro-batch has rows"
        assert model.predictor is not None
        assert cache is not None
        attention = replace(inputs.attention, recorder=None)
        context = model.context(replace(inputs, attention=attention), self.cache.by_layer)
        embedded = model.embedding(to_device(tokens.numpy(), model.device))
        return model.predictor.forward(embedded, hidden, cache, context)

    def _is_predictor_bank(self, bank: BankSpec) -> bool:
        return bank.layer >= len(self.model.layers)

    @torch.inference_mode()
    def capture_graphs(self) -> None:
        """Capture the CUDA graphs of decode steps, if the dispatcher allows it outside a step."""
        if self.graphs is not None and isinstance(self.dispatcher, LocalDispatcher):
            self.graphs.capture()

    def _fits_graph(self, header: StepHeader, plan: StepPlan) -> bool:
        """Whether a CUDA graph can run a step: only decodes, without inspections and adapters."""
        return (
            self.graphs is not None
            and bool(plan.rows or header.bucket)
            and self.graphs.can_run(header)
            and all(rows.is_decode for rows in plan.rows)
            and not any(rows.sequence.request.inspection for rows in plan.rows)
            and not has_adapters(plan.rows)
        )

    def compute(self, inputs: Sequence[ModelInputs]) -> tuple[Tensor, list[Tensor], Tensor]:
        """Run the model for the decode rows of each micro-batch; see ``decode_graphs.Compute``."""
        routed: list[list[RoutedRows]] = [[] for _ in self.banks]
        flows = [self.model.forward(part, self.cache.by_layer) for part in inputs]
        parts = self._run_alternately([len(part.token_ids) for part in inputs], routed, flows)
        hidden = _concatenated(parts)
        ids = [_concatenated([part.topk_ids for part in bank]) for bank in routed]
        return hidden, ids, self.model.head(hidden)

    def _run_native_layers(
        self, parts: Sequence[Sequence[PlannedRows]], routed: list[list[RoutedRows]]
    ) -> _LayerOutputs | None:
        """Run all layers of the micro-batches in one call of native (compiled) code.

        A single micro-batch of decodes also gets its logits from this call. If native code stops in
        an exchange, Python runs the remaining layers. Returns None if native code cannot run the
        step, for example as a request reads values between the layers. Adds to ``routed``.
        """
        native, dispatcher = self._native(), self.dispatcher
        if native is None or not all(parts) or any(map(needs_captures, parts)):
            return None
        if any(map(has_adapters, parts)):
            return None
        if not isinstance(dispatcher, LocalDispatcher | RemoteDispatcher):
            return None
        experts = _native_experts(dispatcher, [sum(rows.count for rows in part) for part in parts])
        if experts is None:
            return None
        flows = native.micro_batches(parts, experts)
        self._begin_compute()
        stop, turn = native.layers.run(flows, dispatcher.activity.advance, self.advance_s)
        dispatcher.note_layers([flow.ends for flow in flows])
        decodes = [num_decodes(part) for part in parts]
        for count, flow in zip(decodes, flows, strict=True):
            for spec, bank, ids in zip(self.banks, routed, flow.topk_ids, strict=True):
                if spec.layer < flow.num_begun:
                    bank.append(RoutedRows(ids, None, count))
        if not stop:
            finite = _concatenated([flow.finite for flow in flows])
            return _LayerOutputs([flow.hidden for flow in flows], finite, flows[0].logits)
        assert isinstance(dispatcher, RemoteDispatcher)
        exchange = dispatcher.native
        assert exchange is not None, "native layers stop only in exchanges"
        exchange.stopped(stop)
        handles: list[DispatchHandle | None] = [None] * len(flows)
        for i, flow in enumerate(flows):
            if flow.is_waiting:
                index = native.layers.bank_of(flow.num_begun - 1)
                handles[i] = exchange.pending(index, i, flow.topk_weights)
        rest = [native.remaining_layers(*pair) for pair in zip(flows, parts, strict=True)]
        return _LayerOutputs(self._run_alternately(decodes, routed, rest, handles, turn))

    def _native(self) -> NativeStep | None:
        """Return the native code for the current model; None if a layer has no native code."""
        known = self.model, self.model.layers
        if any(new is not old for new, old in zip(known, self._known, strict=True)):
            self._known = known
            self._native_step = native_step(self.model, self.cache, self.tables)
        return self._native_step

    def _batch(self, part: Sequence[PlannedRows]) -> MicroBatch:
        model = self.model
        return MicroBatch(
            part, self.cache, self.tables, model.device, model.is_native, self.adapters
        )

    def _layer_steps(self, batch: MicroBatch) -> LayerSteps:
        if batch.inputs is None:
            banks = [bank for bank in self.banks if not self._is_predictor_bank(bank)]
            return _run_empty_exchanges(banks, self.model)
        return self.model.forward(batch.inputs, self.cache.by_layer)

    def _run_alternately(
        self,
        decodes: Sequence[int],
        routed: list[list[RoutedRows]],
        flows: Sequence[LayerSteps],
        handles: Sequence[DispatchHandle | None] = (),
        first: int = 0,
    ) -> list[Tensor]:
        """Run the layers of all micro-batches alternately; return the hidden states of each.

        The experts compute one while attention computes the other: dispatch(l, 0), dispatch(l, 1),
        combine(l, 0), dispatch(l+1, 0), combine(l, 1), .. for layer l. ``decodes``: decode rows of
        each. ``flows``: layers of each, as generators. ``handles``: pending dispatch of each, or
        None. ``first``: index of the micro-batch to resume first. Extends ``routed``.
        """
        under_way = dict(enumerate(handles or [None] * len(flows)))
        for micro_batch, handle in under_way.items():
            if handle is not None:
                next(flows[micro_batch])
        results: dict[int, Tensor] = {}
        for turn in itertools.count(first):
            if len(results) == len(flows):
                break
            micro_batch = turn % len(flows)
            if micro_batch in results:
                continue
            flow, handle = flows[micro_batch], under_way[micro_batch]
            try:
                sent = next(flow) if handle is None else flow.send(self.dispatcher.combine(handle))
            except StopIteration as stop:
                results[micro_batch] = stop.value
                continue
            assert isinstance(sent, Dispatch), "a layer must send rows before it waits"
            under_way[micro_batch] = handle = self._dispatch(sent, micro_batch)
            waits = next(flow) is None  # runs the computation that overlaps the exchange
            assert waits, "a layer must take the outputs before it sends rows"
            if sent.exchange == 0:
                chosen = RoutedRows(sent.topk_ids, handle.copies, decodes[micro_batch])
                routed[sent.bank].append(chosen)
        return [results[micro_batch] for micro_batch in range(len(flows))]

    def _begin_compute(self) -> None:
        self.first_dispatch = time.monotonic()
        self.on_compute()

    def _dispatch(self, sent: Dispatch, micro_batch: int) -> DispatchHandle:
        if self.first_dispatch is None:
            self._begin_compute()
        return self.dispatcher.dispatch(sent, micro_batch)

    def _result(
        self,
        outputs: _LayerOutputs,
        plan: StepPlan,
        order: Sequence[int],
        routed: Sequence[Sequence[RoutedRows]],
        captures: Mapping[SequenceState, Sequence[Capture]],
    ) -> StepResult:
        first_row = [0] * len(order)
        row = 0
        for i in order:
            first_row[i] = row
            row += plan.rows[i].count
        hidden, finite = _concatenated(outputs.hidden), outputs.finite
        if outputs.drawn is not None:
            finite = outputs.drawn[:, 1]
        return StepResult(
            hidden=hidden,
            first_row=tuple(first_row),
            finite=finite_rows(hidden) if finite is None else finite,
            logits=outputs.logits,
            drawn=outputs.drawn,
            finish=self.dispatcher.finish_step,
            routed=routed,
            captures=captures,
        )


def _concatenated(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate the rows of all micro-batches; a single tensor is returned without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat([part for part in parts if len(part)])


def _native_experts(
    dispatcher: LocalDispatcher | RemoteDispatcher, num_rows: Sequence[int]
) -> Sequence[Experts] | None:
    """Return the experts of each micro-batch for native layers; None if Python must dispatch."""
    if isinstance(dispatcher, RemoteDispatcher):
        return None if dispatcher.native is None else dispatcher.native.prepare(num_rows)
    experts = dispatcher.experts()
    return None if experts is None else [experts] * len(num_rows)


def _run_empty_exchanges(banks: Sequence[BankSpec], model: AttentionModel) -> LayerSteps:
    """Return a generator that takes part in all exchanges of ``banks`` without sending rows."""
    for bank in banks:
        ids = torch.empty((0, bank.top_k), dtype=torch.int64, device=model.device)
        weights = torch.empty((0, bank.top_k), dtype=model.dtype, device=model.device)
        for spec in bank.exchanges:
            shape = (0, bank.top_k, spec.in_width) if spec.per_slot_input else (0, spec.in_width)
            rows = torch.empty(shape, dtype=model.dtype, device=model.device)
            yield Dispatch(bank.index, spec.index, rows, ids, weights)
            yield
    return torch.empty((0, 0), dtype=model.dtype, device=model.device)
