"""The local reference against the plain definition of a mixture of experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.harness.mesh import (
    FakeBank,
    local_dispatcher,
    make_attention_bank,
    make_bank,
    make_rows,
)
from cluster.core.placement import BankPlacement, ExpertPlacement
from cluster.core.topology import Generation
from workers.dispatch.local import LocalDispatcher
from workers.model.config import BankSpec
from workers.model.layers import Dispatch


def one_output(spec: BankSpec, exchange: int, row: Tensor, expert: int) -> Tensor:
    bank = FakeBank(spec, range(spec.num_experts))
    zero = torch.zeros(1, dtype=torch.int64)
    return bank.compute(exchange, row.unsqueeze(0), zero, zero + expert)[0]


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (4, 4), (8, 1)])
def test_equals_a_loop_over_tokens_and_slots(num_experts: int, top_k: int) -> None:
    spec = make_bank(num_experts=num_experts, top_k=top_k)
    rows, ids, weights = make_rows(spec, 7, seed=0)
    dispatcher = local_dispatcher([spec])
    got = dispatcher.combine(dispatcher.dispatch(Dispatch(0, 0, rows, ids, weights)))
    for t in range(7):
        total = torch.zeros(16)
        for expert, weight in zip(ids[t].tolist(), weights[t], strict=True):
            total = total + one_output(spec, 0, rows[t], expert) * weight
        assert torch.equal(got[t], total)


def test_unweighted_and_per_slot_exchanges() -> None:
    spec = make_attention_bank()
    rows, ids, weights = make_rows(spec, 5, seed=1)
    dispatcher = local_dispatcher([spec])
    query = dispatcher.combine(dispatcher.dispatch(Dispatch(0, 0, rows, ids, weights)))
    assert query.shape == (5, 2, 6)
    assert torch.equal(query[0, 1], one_output(spec, 0, rows[0], int(ids[0, 1])))
    assert torch.equal(query[1, 0], one_output(spec, 0, rows[1], int(ids[1, 0])))
    output = dispatcher.combine(dispatcher.dispatch(Dispatch(0, 1, query, ids, weights)))
    expected = torch.zeros(16)
    for slot, expert in enumerate(ids[0].tolist()):
        expected = expected + one_output(spec, 1, query[0, slot], expert) * weights[0, slot]
    assert output.shape == (5, 16)
    assert torch.equal(output[0], expected)


def test_zero_rows_work() -> None:
    spec = make_bank()
    dispatcher = local_dispatcher([spec])
    handle = dispatcher.dispatch(Dispatch(0, 0, *make_rows(spec, 0, seed=2)))
    assert dispatcher.combine(handle).shape == (0, 16)


def test_experts_are_found_by_the_placement() -> None:
    spec = make_bank(num_experts=4)
    maps = BankPlacement.from_maps(
        bank="mlp", layer=0, num_experts=4, physical_to_logical=[[2, 3, -1, 0, 1]]
    )
    moved = LocalDispatcher([FakeBank(spec, [2, 3, -1, 0, 1])], [spec])
    moved.set_placement(ExpertPlacement(epoch=1, banks=(maps,)), Generation(number=1, members=()))
    rows, ids, weights = make_rows(spec, 9, seed=3)
    expected = local_dispatcher([spec])
    assert torch.equal(
        moved.combine(moved.dispatch(Dispatch(0, 0, rows, ids, weights))),
        expected.combine(expected.dispatch(Dispatch(0, 0, rows, ids, weights))),
    )
