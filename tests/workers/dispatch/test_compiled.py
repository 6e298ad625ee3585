"""Compiled experts behind every compiled dispatcher: the local reference to the bit."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness.mesh import Mesh, make_header
from cluster.config.cluster import CombineMode
from tests.workers.dispatch.compiled import BANKS, compiled
from tests.workers.dispatch.test_dispatch import MODES, Work
from tests.workers.native.builds import NAMES, team
from workers.dispatch.local import LocalDispatcher

ROWS = (5, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("colocated", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_equals_the_local_reference_with_both_splits(
    num_micro_batches: int, mode: CombineMode, colocated: bool, dtype: torch.dtype
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
            header = make_header(ROWS, step=step, exact=exact, num_micro_batches=num_micro_batches)
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
