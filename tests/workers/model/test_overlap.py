"""Computation that overlaps with the experts runs once, between dispatch and combine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness.local_engine import LocalEngine
from cluster.core.placement import ExpertPlacement
from cluster.core.topology import Generation
from tests.reference.goldens import Golden
from workers.dispatch.dispatcher import BatchRows, DispatchHandle, TokenDispatcher
from workers.model.layers import Dispatch, Layer, LayerContext, LayerSteps
from workers.requests.request import SamplingParams
from workers.requests.step_header import StepHeader


class Diary:
    """A dispatcher that writes down what is done when."""

    def __init__(self, inner: TokenDispatcher) -> None:
        self._inner = inner
        self.entries: list[str] = []

    def begin_step(self, header: StepHeader, micro_batches: Sequence[BatchRows]) -> None:
        self._inner.begin_step(header, micro_batches)

    def run_empty_step(self, header: StepHeader) -> None:
        self._inner.run_empty_step(header)

    def dispatch(self, sent: Dispatch, micro_batch: int = 0) -> DispatchHandle:
        self.entries.append("dispatch")
        return self._inner.dispatch(sent, micro_batch)

    def combine(self, handle: DispatchHandle) -> Tensor:
        self.entries.append("combine")
        return self._inner.combine(handle)

    def finish_step(self) -> None:
        self._inner.finish_step()

    def end_step(self) -> bool:
        return self._inner.end_step()

    @property
    def edge_share(self) -> int:
        return self._inner.edge_share

    def set_placement(self, placement: ExpertPlacement, generation: Generation) -> None:
        self._inner.set_placement(placement, generation)


class Noted:
    """A part of a layer, whose calls are written down."""

    def __init__(self, part: Callable[[Tensor], Tensor], diary: Diary) -> None:
        self._part = part
        self._diary = diary

    def __call__(self, rows: Tensor) -> Tensor:
        self._diary.entries.append("compute")
        return self._part(rows)


def note_overlapped(engine: LocalEngine, diary: Diary) -> int:
    """Write down what layers with experts compute while these work; returns how many layers."""
    model, count = engine.engine.runner.model, 0
    layers: list[Any] = list(model.layers)
    for i, layer in enumerate(layers):
        half = layer.half
        if half.router is None:
            continue
        if layer.mlp is not None:
            layers[i] = replace(layer, mlp=Noted(layer.mlp, diary))
        else:
            projections = replace(half.projections, kv=Noted(half.projections.kv, diary))
            layers[i] = replace(layer, half=replace(half, projections=projections))
        count += 1
    model.layers = tuple(layers)
    return count


@pytest.mark.parametrize(
    ("variant", "layer"),
    [
        ("dots1-groups", ["dispatch", "compute", "combine"]),
        ("glm4moe-official-like", ["dispatch", "compute", "combine"]),
        ("jetmoe-tied", ["dispatch", "compute", "combine", *["dispatch", "combine"] * 2]),
    ],
)
@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_families_use_the_time_of_an_exchange(
    golden: Callable[[str], Golden],
    variant: str,
    layer: list[str],
    num_micro_batches: int,
) -> None:
    diaries: list[Diary] = []

    def wrap(inner: TokenDispatcher) -> TokenDispatcher:
        diaries.append(Diary(inner))
        return diaries[-1]

    engine = LocalEngine(
        golden(variant).path, wrap=wrap, num_micro_batches=num_micro_batches, kernels="torch"
    )
    num_layers = note_overlapped(engine, diaries[0])
    engine.generate([golden(variant).prompt(2)], SamplingParams(max_tokens=1))
    assert num_layers == len({bank.layer for bank in engine.banks})
    assert diaries[0].entries == interleaved(layer * num_layers, num_micro_batches)


def interleaved(entries: list[str], num_micro_batches: int) -> list[str]:
    """The entries of each micro-batch up to its next combine, in turn."""
    parts: list[list[str]] = [[]]
    for entry in entries:
        if entry == "combine":
            parts.append([])
        parts[-1].append(entry)
    return [entry for part in parts for entry in part * num_micro_batches]


class SendsTwice:
    def forward(self, hidden: Tensor, cache: Tensor, context: LayerContext) -> LayerSteps:
        rows = torch.zeros(0, 1)
        yield Dispatch(0, 0, rows, rows, rows)
        yield Dispatch(0, 0, rows, rows, rows)
        return rows


class WaitsForNothing:
    def forward(self, hidden: Tensor, cache: Tensor, context: LayerContext) -> LayerSteps:
        return (yield)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (SendsTwice(), "must take the outputs before it sends rows"),
        (WaitsForNothing(), "must send rows before it waits"),
    ],
)
def test_a_layer_that_breaks_the_order_is_a_mistake(
    golden: Callable[[str], Golden], layer: Layer, message: str
) -> None:
    engine = LocalEngine(golden("olmoe-base").path)
    model = engine.engine.runner.model
    model.layers = (layer,) * len(model.layers)
    with pytest.raises(AssertionError, match=message):
        engine.generate([(1, 2)], SamplingParams(max_tokens=1))
