"""Work beside the experts is done between dispatch and combine, and once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from cluster.placement import ExpertPlacement
from cluster.topology import Generation
from tests.goldens import Golden
from workers.dist.dispatcher import BatchRows, DispatchHandle, TokenDispatcher
from workers.dist.header import StepHeader
from workers.layers import Aside
from workers.local_engine import LocalEngine
from workers.request import SamplingParams


class Diary:
    """A dispatcher that writes down what is done when."""

    def __init__(self, inner: TokenDispatcher) -> None:
        self._inner = inner
        self.entries: list[str] = []

    def begin_step(self, header: StepHeader, micro_batches: Sequence[BatchRows]) -> None:
        self._inner.begin_step(header, micro_batches)

    def sit_out(self, header: StepHeader) -> None:
        self._inner.sit_out(header)

    def dispatch(
        self,
        rows: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        bank: int,
        exchange: int = 0,
        micro_batch: int = 0,
    ) -> DispatchHandle:
        self.entries.append("dispatch")
        return self._inner.dispatch(rows, topk_ids, topk_weights, bank, exchange, micro_batch)

    def combine(self, handle: DispatchHandle) -> Tensor:
        self.entries.append("combine")
        return self._inner.combine(handle)

    def set_placement(self, placement: ExpertPlacement, generation: Generation) -> None:
        self._inner.set_placement(placement, generation)


def test_it_is_computed_once() -> None:
    calls = []

    def compute() -> Tensor:
        calls.append(1)
        return torch.ones(1)

    aside = Aside(compute)
    assert aside.result() is aside.result()
    assert calls == [1]


@pytest.mark.parametrize(
    ("variant", "layer"),
    [
        ("dots1-groups", ["dispatch", "aside", "combine"]),
        ("jetmoe-tied", ["dispatch", "aside", "combine", *["dispatch", "combine"] * 2]),
    ],
)
def test_families_use_the_time_of_an_exchange(
    golden: Callable[[str], Golden],
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
    layer: list[str],
) -> None:
    diaries: list[Diary] = []

    def wrap(inner: TokenDispatcher) -> TokenDispatcher:
        diaries.append(Diary(inner))
        return diaries[-1]

    engine = LocalEngine(golden(variant).path, wrap=wrap)
    result = Aside.result

    def noted(aside: Aside) -> Tensor:
        if aside._result is None:
            diaries[0].entries.append("aside")
        return result(aside)

    monkeypatch.setattr(Aside, "result", noted)
    engine.generate([golden(variant).prompt(2)], SamplingParams(max_tokens=1))
    num_layers = len({bank.layer for bank in engine.banks})
    assert diaries[0].entries == layer * num_layers
