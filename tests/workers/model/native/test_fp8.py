"""Native attention halves over a cache in 8 bits: torch's bytes, and bits of the row alone."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor

from tests.workers.model.native.test_native_sublayer import (
    BLOCK,
    CASES,
    LENGTHS,
    NUM_BLOCKS,
    TABLES,
    WHOLE,
    Case,
    Notes,
    assert_equal,
    in_chunks,
    make,
    make_batch,
    serve,
)
from tests.workers.native.builds import NAMES, team
from workers.model import fp8
from workers.model.attention_sublayer import SublayerStages
from workers.model.building_blocks import BuildingBlocks
from workers.model.layers import LayerContext
from workers.model.native.blocks import NativeBlocks

pytestmark = pytest.mark.heavy

DTYPES = [torch.float32, torch.bfloat16]


def empty_cache(case: Case) -> Tensor:
    shape = (case.num_vectors, NUM_BLOCKS, BLOCK, fp8.row_bytes(case.head_dim))
    return torch.zeros(shape, dtype=fp8.ROW_DTYPE)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_those_of_torch(name: str, dtype: torch.dtype, case: Case) -> None:
    """The first layer's keys and values do not depend on the type of the cache."""
    half = make(case, dtype, NativeBlocks(team(name)))
    exact = torch.zeros(case.num_vectors, NUM_BLOCKS, BLOCK, case.head_dim, dtype=dtype)
    serve(half, case, dtype, WHOLE, cache=exact)
    found = empty_cache(case)
    serve(half, case, dtype, WHOLE, cache=found)
    written = found[..., -1] != 0
    assert written.sum() == case.num_vectors * sum(LENGTHS)
    assert torch.equal(found[written], fp8.encode(exact)[written])
    assert not found[~written].any()


@pytest.mark.parametrize("name", NAMES)
def test_values_of_all_sizes_are_stored_as_by_torch(name: str) -> None:
    """Values are stored as they are given: neither rotated nor normalised."""
    case, dtype = CASES["jetmoe"], torch.float32
    half = cast(SublayerStages, make(case, dtype, NativeBlocks(team(name))))
    generator = torch.Generator().manual_seed(3)
    count, width = LENGTHS[0], case.num_kv_heads * case.head_dim
    rows = torch.randn(count, (case.num_heads + 2 * case.num_kv_heads) * 16, generator=generator)
    values = rows[:, -width:].view(count, case.num_kv_heads, case.head_dim)
    values *= torch.exp(8 * torch.randn(values.shape, generator=generator))
    values[0, 0] = torch.arange(16) * 2.0**-10  # ties, and numbers below the smallest normal code
    values[0, 0, -1] = 448
    values[1, 0, 3], values[2, 1, 5], values[3, 2, 0] = torch.nan, torch.inf, -torch.inf
    values[4] = 0.0
    values[5] *= 2.0**-140
    values[6, 0, 0] = torch.finfo(dtype).max
    cache, batch = empty_cache(case), make_batch(WHOLE[0], dtype, None)
    wave = torch.ones(count, 1, case.head_dim)
    assert batch.chunks is not None
    context = LayerContext(wave, wave, batch, {}, batch.chunks.fields(wave, wave, cache))
    half.attend_rows(rows, cache, context)
    slots = cache.view(2 * case.num_kv_heads, -1, cache.shape[-1])[case.num_kv_heads :]
    stored = slots[:, batch.slot_mapping].transpose(0, 1)
    assert torch.equal(stored, fp8.encode(values))
    assert TABLES[0][0] * BLOCK == batch.slot_mapping[0]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", NAMES)
def test_float32_is_near_torch(name: str, case: Case) -> None:
    """A key that torch rounds otherwise may lie between two codes: few outputs differ by more."""
    dtype, ours, theirs = torch.float32, Notes(), Notes()
    native, torch_half = (
        make(case, dtype, blocks) for blocks in (NativeBlocks(team(name)), BuildingBlocks())
    )
    found = serve(native, case, dtype, WHOLE, ours, empty_cache(case))
    expected = serve(torch_half, case, dtype, WHOLE, theirs, empty_cache(case))
    exact = serve(native, case, dtype, WHOLE)
    for own, other, plain in zip(found, expected, exact, strict=True):
        difference = (own[0] - other[0]).abs()
        assert difference.mean() < 2e-6
        assert difference.max() < 0.02
        assert 1e-4 < (own[0] - plain[0]).abs().mean() < 0.05, "8 bits are rounded, a little"
    for noted, wanted in zip(ours.maps, theirs.maps, strict=True):
        assert (noted - wanted).abs().mean() < 2e-6


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_near_torch(name: str, case: Case) -> None:
    dtype = torch.bfloat16
    native, torch_half = (
        make(case, dtype, blocks) for blocks in (NativeBlocks(team(name)), BuildingBlocks())
    )
    found = serve(native, case, dtype, WHOLE, cache=empty_cache(case))
    expected = serve(torch_half, case, dtype, WHOLE, cache=empty_cache(case))
    for own, other in zip(found, expected, strict=True):
        difference = (own[0].float() - other[0].float()).abs()
        assert difference.max() < 0.1
        assert difference.mean() < 0.01


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_bits_depend_on_the_row_alone(name: str, dtype: torch.dtype, case: Case) -> None:
    half = make(case, dtype, NativeBlocks(team(name)))
    whole = serve(half, case, dtype, WHOLE, cache=empty_cache(case))
    together = [[(0, 0, 30), (2, 0, 17)], [(1, 0, 9), (0, 30, 31), (2, 17, 20)], [(0, 31, 37)]]
    for batches in (in_chunks(*range(1, LENGTHS[0])), in_chunks(1, 3, 8, 19, 36), together):
        assert_equal(serve(half, case, dtype, batches, cache=empty_cache(case)), whole)
    other = make(case, dtype, NativeBlocks(team(name, 3)))
    assert_equal(serve(other, case, dtype, together, cache=empty_cache(case)), whole)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_float32_has_the_same_bits_on_all_instruction_sets(case: Case) -> None:
    dtype = torch.float32
    found = [
        serve(
            make(case, dtype, NativeBlocks(team(name))), case, dtype, WHOLE, None, empty_cache(case)
        )
        for name in NAMES
    ]
    for other in found[1:]:
        assert_equal(other, found[0])
