"""Packed weights: a bijection, in the order of the products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.native.builds import NAMES, library
from workers.native.panels import PANEL, pack, packed_bytes, unpack


@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    is_gated=st.booleans(),
)
def test_what_is_packed_can_be_unpacked(
    rows: int, width: int, dtype: torch.dtype, is_gated: bool
) -> None:
    shape = (2 * rows if is_gated else rows, width)
    weight = torch.randn(shape).to(dtype)
    packed = pack(library(NAMES[-1]), weight, is_gated)
    assert packed.nbytes == packed_bytes(shape, dtype, is_gated)
    found = unpack(library(NAMES[-1]), packed, shape, dtype, is_gated)
    assert found.is_contiguous()
    assert torch.equal(found, weight)


@pytest.mark.parametrize("name", NAMES)
def test_whole_panels_have_no_spare_bytes(name: str) -> None:
    weight = torch.randn(4 * PANEL, 6).bfloat16()
    assert pack(library(name), weight).nbytes == weight.nbytes
    assert pack(library(name), weight, is_gated=True).nbytes == weight.nbytes


def test_a_panel_has_pairs_of_a_row_beside_those_of_other_outputs() -> None:
    weight = torch.arange(64 * 4).view(64, 4).bfloat16()
    panels = pack(library(NAMES[0]), weight).view(torch.bfloat16).view(2, 2, PANEL, 2)
    assert torch.equal(panels[1, 0, 3], weight[PANEL + 3, :2])
    assert torch.equal(panels[0, 1, 31], weight[31, 2:])


def test_gate_and_up_alternate() -> None:
    weight = torch.arange(64.0).view(64, 1)
    panels = pack(library(NAMES[0]), weight, is_gated=True).view(torch.float32).view(2, PANEL)
    assert panels[0].tolist() == [*range(16), *range(32, 48)]
    assert panels[1].tolist() == [*range(16, 32), *range(48, 64)]


def test_a_matrix_that_is_not_contiguous() -> None:
    weight = torch.randn(33, 9).t()
    packed = pack(library(NAMES[0]), weight)
    assert torch.equal(unpack(library(NAMES[0]), packed, (9, 33), torch.float32), weight)
