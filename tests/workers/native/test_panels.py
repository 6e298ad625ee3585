"""Packed weights: a bijection, in the order of the products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from tests.workers.native.builds import NAMES, library, team
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


def plain_pack(weight: torch.Tensor, is_gated: bool) -> torch.Tensor:
    """``pack`` of torch, for bfloat16 rows of even width and float32 ones."""
    units = weight.view(torch.int32)
    halves = units.chunk(2) if is_gated else (units,)
    lanes = PANEL // len(halves)
    padded = [functional.pad(half, (0, 0, 0, -len(half) % lanes)) for half in halves]
    panels = torch.cat([half.view(-1, lanes, units.shape[1]) for half in padded], 1)
    return panels.transpose(1, 2).contiguous()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("shape", [(2, 4), (70, 34), (290, 512)])
def test_panels_are_those_of_torch_by_any_number_of_threads(
    name: str, num_threads: int, is_gated: bool, shape: tuple[int, int]
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(shape).to(dtype)
        expected = plain_pack(weight, is_gated)
        found = pack(library(name), weight, is_gated, team(name, num_threads))
        assert torch.equal(found, expected)
        assert torch.equal(pack(library(name), weight, is_gated), expected)


@pytest.mark.parametrize("name", NAMES)
def test_rows_need_no_alignment(name: str) -> None:
    """A bfloat16 tensor of a file may begin at any even byte."""
    values = torch.randn(40 * 24 + 1).bfloat16()
    weight = values[1:].view(40, 24)
    assert torch.equal(pack(library(name), weight), plain_pack(weight.clone(), False))


def test_a_team_that_computes_does_not_pack() -> None:
    busy = team(NAMES[0], 2)
    functions = busy.library.functions
    assert functions.team_claim(busy.pointer)
    try:
        with pytest.raises(RuntimeError, match="another thread computes"):
            pack(busy.library, torch.ones(2, 2), team=busy)
    finally:
        functions.team_release(busy.pointer)


def test_a_matrix_that_is_not_contiguous() -> None:
    weight = torch.randn(33, 9).t()
    packed = pack(library(NAMES[0]), weight)
    assert torch.equal(unpack(library(NAMES[0]), packed, (9, 33), torch.float32), weight)
