"""Compiled experts behind every compiled dispatcher: the local reference to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from cluster.config.cluster import CombineMode
from cluster.core.placement import FREE_SLOT
from tests.workers.dispatch.test_dispatch import MODES, Work
from tests.workers.native.builds import NAMES, library, team
from tests.workers.transport.mesh import Mesh, make_attention_bank, make_bank, make_header
from workers.dispatch.local import LocalDispatcher
from workers.experts.bank import ExpertBank, make_kernel
from workers.experts.kernels_native import NativeExperts
from workers.model.config import BankSpec, ExchangeSpec
from workers.native.team import Team

CPU = torch.device("cpu")
_GATED = ExchangeSpec(index=0, name="mlp", in_width=40, out_width=40, expert_width=24)
_LINEAR = tuple(replace(e, expert_kind="linear") for e in make_attention_bank().exchanges)
BANKS = (
    replace(make_bank(0, top_k=3), exchanges=(_GATED,)),
    replace(make_attention_bank(1), exchanges=_LINEAR),
)
ROWS = (5, 3)


def weight(spec: BankSpec, expert: int, exchange: int, matrix: int) -> Tensor:
    """float32 [out, in], the same on every worker."""
    shape = spec.exchanges[exchange].matrix_shapes[matrix]
    seed = ((spec.index * 100 + expert) * 10 + exchange) * 10 + matrix
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.div(shape[1] ** 0.5)


def compiled(spec: BankSpec, experts: Sequence[int], dtype: torch.dtype) -> ExpertBank:
    """A bank with these experts in its slots, and threads of its own."""
    own = Team(library(NAMES[0]), 2)
    bank = ExpertBank(spec, len(experts), dtype, CPU, partial(make_kernel, team=own))
    for slot, expert in enumerate(experts):
        if expert != FREE_SLOT:
            for exchange, matrix, _ in spec.matrices:
                bank.store(slot, exchange, matrix, weight(spec, expert, exchange, matrix).to(dtype))
    assert all(isinstance(kernel, NativeExperts) for kernel in bank._kernels)
    return bank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("colocated", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_equals_the_local_reference_with_both_splits(
    mode: CombineMode, colocated: bool, dtype: torch.dtype
) -> None:
    """Bit for bit by slots; partial sums of several workers are rounded in another order."""
    slots = [compiled(bank, range(bank.num_experts), dtype) for bank in BANKS]
    reference = LocalDispatcher(slots, BANKS)
    num_experts = 2 if colocated else 3
    mesh = Mesh(
        2,
        num_experts,
        BANKS,
        mode,
        dtype=dtype,
        spare=1,
        colocated=colocated,
        make_slots=lambda bank, experts: compiled(bank, experts, dtype),
        team=team(NAMES[0]),
    )
    with mesh:
        for step, exact in enumerate((False, True), start=1):
            header = make_header(ROWS, step=step, exact=exact)
            work = Work(BANKS, ROWS, header, dtype)
            for rank, results in enumerate(mesh.step(header, work)):
                for mine, expected in zip(results, work(rank, reference), strict=True):
                    if mode == "per_slot":
                        assert torch.equal(mine, expected)
                    else:
                        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_one_expert_worker_have_the_bits_of_the_local_reference(
    dtype: torch.dtype,
) -> None:
    slots = [compiled(bank, range(bank.num_experts), dtype) for bank in BANKS]
    reference = LocalDispatcher(slots, BANKS)
    mesh = Mesh(
        2,
        1,
        BANKS,
        "sum",
        dtype=dtype,
        make_slots=lambda bank, experts: compiled(bank, experts, dtype),
        team=team(NAMES[0]),
    )
    with mesh:
        header = make_header(ROWS)
        work = Work(BANKS, ROWS, header, dtype)
        for rank, results in enumerate(mesh.step(header, work)):
            for mine, expected in zip(results, work(rank, reference), strict=True):
                assert torch.equal(mine, expected)
