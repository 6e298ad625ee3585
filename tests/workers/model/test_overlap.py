"""Computation that overlaps with the experts runs once, between dispatch and combine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from cluster.core.placement import ExpertPlacement
from cluster.core.topology import Generation
from tests.harness.local_engine import LocalEngine
from tests.reference.goldens import Golden
from workers.dispatch.dispatcher import BatchRows, DispatchHandle, TokenDispatcher
from workers.model.layers import Dispatch, LayerSteps
from workers.requests.request import SamplingParams
from workers.requests.step_header import StepHeader


class Diary:
    """A dispatcher that writes down what is done when."""

    def __init__(self, inner: TokenDispatcher) -> None:
        self._inner = inner
        self.entries: list[str] = []

    def begin_step(self, header: StepHeader, micro_batches: Sequence[BatchRows]) -> None:
        self._inner.begin_step(header, micro_batches)

    def sit_out(self, header: StepHeader) -> None:
        self._inner.sit_out(header)

    def dispatch(self, sent: Dispatch, micro_batch: int = 0) -> DispatchHandle:
        self.entries.append("dispatch")
        return self._inner.dispatch(sent, micro_batch)

    def combine(self, handle: DispatchHandle) -> Tensor:
        self.entries.append("combine")
        return self._inner.combine(handle)

    def set_placement(self, placement: ExpertPlacement, generation: Generation) -> None:
        self._inner.set_placement(placement, generation)


OVERLAPPED = {"dots1-groups": "mlp", "jetmoe-tied": "kv"}
"""By variant, the field of a layer that is computed while the experts work."""


def note_overlapped(
    engine: LocalEngine, diary: Diary, name: str, monkeypatch: pytest.MonkeyPatch
) -> int:
    """Write down every call of that field in layers with experts; returns how many layers."""
    parts = [
        getattr(layer, name)
        for layer in engine._model._layers
        if getattr(layer, "router", True) is not None
    ]
    kind = type(parts[0])
    call: Callable[[object, Tensor], Tensor] = kind.__call__

    def noted(part: object, rows: Tensor) -> Tensor:
        if any(part is one for one in parts):
            diary.entries.append("compute")
        return call(part, rows)

    monkeypatch.setattr(kind, "__call__", noted)
    return len(parts)


@pytest.mark.parametrize(
    ("variant", "layer"),
    [
        ("dots1-groups", ["dispatch", "compute", "combine"]),
        ("jetmoe-tied", ["dispatch", "compute", "combine", *["dispatch", "combine"] * 2]),
    ],
)
@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_families_use_the_time_of_an_exchange(
    golden: Callable[[str], Golden],
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
    layer: list[str],
    num_micro_batches: int,
) -> None:
    diaries: list[Diary] = []

    def wrap(inner: TokenDispatcher) -> TokenDispatcher:
        diaries.append(Diary(inner))
        return diaries[-1]

    engine = LocalEngine(golden(variant).path, wrap=wrap, num_micro_batches=num_micro_batches)
    num_layers = note_overlapped(engine, diaries[0], OVERLAPPED[variant], monkeypatch)
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


def sends_twice() -> LayerSteps:
    rows = torch.zeros(0, 1)
    yield Dispatch(0, 0, rows, rows, rows)
    yield Dispatch(0, 0, rows, rows, rows)
    return rows


def waits_for_nothing() -> LayerSteps:
    return (yield)


@pytest.mark.parametrize(
    ("layer", "message"),
    [(sends_twice, "before it took the outputs"), (waits_for_nothing, "rows that it did not send")],
)
def test_a_layer_that_breaks_the_order_is_a_mistake(
    golden: Callable[[str], Golden],
    monkeypatch: pytest.MonkeyPatch,
    layer: Callable[[], LayerSteps],
    message: str,
) -> None:
    engine = LocalEngine(golden("olmoe-base").path)
    monkeypatch.setattr(engine._model, "forward", lambda *_: layer())
    with pytest.raises(AssertionError, match=message):
        engine.generate([(1, 2)], SamplingParams(max_tokens=1))
