"""One step of the model: from planned rows to the final hidden states of each of them.

The runner drives one generator per micro-batch (see ``workers.model.layers``): it dispatches the
exchanges that a layer yields, and resumes the layer with the combined outputs. Where nothing looks
between the layers, native kernels run all of them in one call, with the exchanges. A step changes
nothing but the KV of the rows it runs, which no step reads before this one is committed.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.dispatch.dispatcher import DispatchHandle, TokenDispatcher
from workers.dispatch.local import LocalDispatcher
from workers.dispatch.remote import RemoteDispatcher
from workers.engine.batch import Batch, batch_order, split_rows
from workers.engine.decode_graphs import DecodeGraphs
from workers.engine.expert_load import Routed
from workers.engine.step_plan import StepPlan
from workers.inspection.recorder import Capture
from workers.kv.block_tables import BlockTables
from workers.kv.cache import KVCache
from workers.model.config import BankSpec
from workers.model.families.native_layers import Experts, Flow, NativeLayers, native_layers
from workers.model.layers import (
    AttentionModel,
    Dispatch,
    Layer,
    LayerContext,
    LayerSteps,
    ModelInputs,
)
from workers.requests.sequence import SequenceState
from workers.requests.step_header import StepHeader
from workers.sampling.best_tokens import finite_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """The model's outputs for a plan."""

    hidden: Tensor
    """[num_rows, hidden_size] after the final norm."""
    first_row: tuple[int, ...]
    """Row of ``hidden`` where each entry of ``plan.rows`` begins."""
    finite: Tensor
    """[num_rows] bool: no NaN or infinity in these rows of ``hidden``."""
    routed: tuple[tuple[Routed, ...], ...]
    """[bank][micro-batch]: the experts that were chosen."""
    captures: Mapping[SequenceState, Sequence[Capture]]
    """What was recorded for sequences whose requests inspect the inside of the model."""


@dataclass(kw_only=True)
class ModelRunner:
    """Runs plans on one attention rank, over any ``TokenDispatcher``."""

    model: AttentionModel
    """May be replaced."""
    cache: KVCache
    tables: BlockTables
    banks: Sequence[BankSpec]
    dispatcher: TokenDispatcher
    rank: int = 0
    first_dispatch: float | None = None
    """Monotonic seconds of the latest step's first dispatch, also when the step failed.

    Where there is none, the begin of its layers."""
    on_compute: Callable[[], None] = lambda: None
    """Called at that time."""
    advance_s: float = 0.1
    """Native layers report their progress after the one in which this time is over."""
    graphs: DecodeGraphs | None = None
    """Run decode steps on a GPU whose experts are all here."""
    _known_layers: Sequence[Layer] = ()
    _native_layers: NativeLayers | None = None
    """Made of ``_known_layers``."""

    def run(self, header: StepHeader, plan: StepPlan) -> StepResult | None:
        """Run a plan; None when it has no rows. Raises ``TransportError``.

        Takes part in every exchange of a micro-batch that was granted rows, even if the plan has
        fewer rows than granted, or none.
        """
        self.first_dispatch = None
        if self._fits_graph(header, plan):
            assert self.graphs is not None
            self.dispatcher.begin_step(header, ())
            self._begin_compute()
            output = self.graphs.run(plan.rows)
            if isinstance(self.dispatcher, LocalDispatcher):
                self.dispatcher.activity.advance()
            order = list(range(len(plan.rows)))
            ids = [[Routed(own, None, len(order))] for own in output.topk_ids]
            return self._result(output.hidden, plan, order, ids, {})
        if not header.grant(self.rank).num_rows:
            assert not plan.rows, "rows without a grant"
            self.dispatcher.sit_out(header)
            return None
        order = sorted(range(len(plan.rows)), key=lambda i: batch_order(plan.rows[i]))
        planned = [plan.rows[i] for i in order]
        parts = split_rows(planned, header.rows(self.rank, 0))[: header.num_micro_batches]
        model = self.model
        batches = [
            Batch(part, self.cache, self.tables, model.device, model.is_native) for part in parts
        ]
        self.dispatcher.begin_step(header, [b.rows for b in batches])
        routed: list[list[Routed]] = [[] for _ in self.banks]
        hidden = self._run_whole(batches, routed)
        if hidden is None:
            num_decodes = [batch.num_decodes for batch in batches]
            hidden = self._drive(num_decodes, routed, [self._flow(batch) for batch in batches])
        if not plan.rows:
            return None
        joined = hidden[0] if len(hidden) == 1 else torch.cat([h for h in hidden if len(h)])
        captures: dict[SequenceState, list[Capture]] = {}
        for batch in batches:
            for sequence, capture in batch.captures:
                captures.setdefault(sequence, []).append(capture)
        return self._result(joined, plan, order, routed, captures)

    @torch.inference_mode()
    def capture_graphs(self, max_rows: int) -> None:
        """Capture what decode steps of up to so many rows replay, if they do."""
        if self.graphs is not None:
            self.graphs.capture(max_rows)

    def _fits_graph(self, header: StepHeader, plan: StepPlan) -> bool:
        """All rows are decodes, and nothing looks between the layers."""
        return (
            self.graphs is not None
            and 0 < len(plan.rows) <= self.graphs.max_rows
            and header.num_micro_batches == 1
            and all(rows.is_decode for rows in plan.rows)
            and not any(rows.sequence.request.inspection for rows in plan.rows)
        )

    def compute(self, inputs: ModelInputs) -> tuple[Tensor, list[Tensor]]:
        """All layers for decode rows: hidden states [T, H], and by bank the experts [T, k]."""
        routed: list[list[Routed]] = [[] for _ in self.banks]
        flow = self.model.forward(inputs, self.cache.layers)
        (hidden,) = self._drive([len(inputs.token_ids)], routed, [flow])
        return hidden, [own.topk_ids for (own,) in routed]

    def _run_whole(
        self, batches: Sequence[Batch], routed: list[list[Routed]]
    ) -> list[Tensor] | None:
        """Run all layers of the micro-batches in one native call.

        Where that stops in an exchange, the rest of the layers is run one by one. None: something
        looks between the layers.
        """
        native, dispatcher = self._native(), self.dispatcher
        inputs = [
            batch.inputs
            for batch in batches
            if batch.inputs is not None and batch.inputs.attention.recorder is None
        ]
        if native is None or len(inputs) < len(batches):
            return None
        if not isinstance(dispatcher, LocalDispatcher | RemoteDispatcher):
            return None
        experts = _experts(dispatcher, [len(own.token_ids) for own in inputs])
        if experts is None:
            return None
        caches = self.cache.layers
        entered = [self.model.enter(own, caches) for own in inputs]
        flows = []
        for (hidden, context), own_experts in zip(entered, experts, strict=True):
            assert context.native is not None, "native layers are those of a native model"
            flows.append(Flow(hidden, context.native, own_experts, native.top_k))
        self._begin_compute()
        stop, turn = native.run(flows, dispatcher.activity.advance, self.advance_s)
        dispatcher.note_layers([flow.ends for flow in flows])
        for batch, flow in zip(batches, flows, strict=True):
            for spec, bank, ids in zip(self.banks, routed, flow.topk_ids, strict=True):
                if spec.layer < flow.num_begun:
                    bank.append(Routed(ids, None, batch.num_decodes))
        if not stop:
            return [self.model.norm(flow.hidden) for flow in flows]
        assert isinstance(dispatcher, RemoteDispatcher)
        dispatcher.stopped(stop)
        handles: list[DispatchHandle | None] = [None] * len(flows)
        for i, flow in enumerate(flows):
            if flow.is_waiting:
                index = native.bank_of(flow.num_begun - 1)
                handles[i] = dispatcher.waiting(index, i, flow.topk_weights)
        rest = [
            self._rest(native, flow, context)
            for flow, (_, context) in zip(flows, entered, strict=True)
        ]
        return self._drive([batch.num_decodes for batch in batches], routed, rest, handles, turn)

    def _rest(self, native: NativeLayers, flow: Flow, context: LayerContext) -> LayerSteps:
        """What native layers have left: at first the exchange in which they have stopped."""
        if flow.is_waiting:
            outputs = yield
            others = flow.others if native.has_mlp(flow.num_begun - 1) else None
            flow.hidden.add_(outputs if others is None else outputs + others)
        rest = self.model.run_from(flow.num_begun, flow.hidden, context, self.cache.layers)
        return (yield from rest)

    def _native(self) -> NativeLayers | None:
        """The model's layers for native calls, if such a call can run all of them."""
        if self._known_layers is not self.model.layers:
            self._known_layers = self.model.layers
            self._native_layers = native_layers(self.model.layers, self.cache.layers)
        return self._native_layers

    def _flow(self, batch: Batch) -> LayerSteps:
        if batch.inputs is None:
            return _idle(self.banks, self.model)
        return self.model.forward(batch.inputs, self.cache.layers)

    def _drive(
        self,
        num_decodes: Sequence[int],
        routed: list[list[Routed]],
        flows: Sequence[LayerSteps],
        handles: Sequence[DispatchHandle | None] = (),
        first: int = 0,
    ) -> list[Tensor]:
        """Resume the micro-batches alternately until all have ended; returns their hidden states.

        With two, the experts work on one while the other is in attention here:
        dispatch(l, 0), dispatch(l, 1), combine(l, 0), dispatch(l+1, 0), combine(l, 1), ..
        ``handles`` of those that have dispatched rows already, whose flows take their outputs
        first; ``first``: whose turn it is.
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
            assert isinstance(sent, Dispatch), "a layer waits for rows that it did not send"
            under_way[micro_batch] = handle = self._dispatch(sent, micro_batch)
            waits = next(flow) is None  # runs the layer's overlapped computation
            assert waits, "a layer sends rows before it took the outputs of the last ones"
            if sent.exchange == 0:
                chosen = Routed(sent.topk_ids, handle.copies, num_decodes[micro_batch])
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
        hidden: Tensor,
        plan: StepPlan,
        order: Sequence[int],
        routed: list[list[Routed]],
        captures: Mapping[SequenceState, Sequence[Capture]],
    ) -> StepResult:
        first_row = [0] * len(order)
        row = 0
        for i in order:
            first_row[i] = row
            row += plan.rows[i].count
        return StepResult(
            hidden=hidden,
            first_row=tuple(first_row),
            finite=finite_rows(hidden),
            routed=tuple(map(tuple, routed)),
            captures=captures,
        )


def _experts(
    dispatcher: LocalDispatcher | RemoteDispatcher, num_rows: Sequence[int]
) -> Sequence[Experts] | None:
    """For native layers: the experts by micro-batch of so many rows; None: rows are dispatched."""
    if isinstance(dispatcher, RemoteDispatcher):
        return dispatcher.homes(num_rows)
    experts = dispatcher.experts()
    return None if experts is None else [experts] * len(num_rows)


def _idle(banks: Sequence[BankSpec], model: AttentionModel) -> LayerSteps:
    """All exchanges of a step without a row: peers expect them where rows were granted."""
    for bank in banks:
        ids = torch.empty((0, bank.top_k), dtype=torch.int64, device=model.device)
        weights = torch.empty((0, bank.top_k), dtype=model.dtype, device=model.device)
        for spec in bank.exchanges:
            shape = (0, bank.top_k, spec.in_width) if spec.per_slot_input else (0, spec.in_width)
            rows = torch.empty(shape, dtype=model.dtype, device=model.device)
            yield Dispatch(bank.index, spec.index, rows, ids, weights)
            yield
    return torch.empty((0, 0), dtype=model.dtype, device=model.device)
