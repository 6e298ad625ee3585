"""Random rows, choices and headers through whole data planes, against the local reference.

``test_local.py`` holds that reference to a loop over rows and slots.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.harness.mesh import Mesh, make_header
from tests.workers.dispatch.test_dispatch import BANKS, MODES, Work, check


@pytest.fixture(scope="module", params=MODES)
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    """Two attention ranks, three expert ranks with two spare slots each, full of copies."""
    with Mesh(2, 3, BANKS, request.param, spare=2) as made:
        yield made


@pytest.fixture(scope="module")
def steps() -> Iterator[int]:
    """Step numbers, each used once."""
    return iter(range(1, 1_000_000))


@settings(max_examples=25)
@given(
    rows=st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(any),
    seed=st.integers(0, 2**31),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    exact=st.booleans(),
    num_micro_batches=st.integers(1, 2),
)
def test_equals_the_local_reference(
    mesh: Mesh,
    steps: Iterator[int],
    rows: tuple[int, int],
    seed: int,
    share: float,
    exact: bool,
    num_micro_batches: int,
) -> None:
    """Experts in any order, some of them twice in a row; ``share`` of the slots have the first."""

    def change(ids: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        mixed = ids.flatten()[torch.randperm(ids.numel(), generator=generator)].view(ids.shape)
        return mixed.masked_fill(torch.rand(ids.shape, generator=generator) < share, 0)

    header = make_header(rows, step=next(steps), exact=exact, num_micro_batches=num_micro_batches)
    work = Work(BANKS, rows, header, change=change)
    check(mesh, work, bitwise=mesh.combine_mode == "per_slot")
