"""Products with quantized weights: against the numbers that codes stand for, and to the bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.native.builds import NAMES, library, team
from tests.workers.quantization.random import FORMATS as KNOWN
from tests.workers.quantization.random import name_of, random_matrix
from workers.native.experts import ExpertShape, SlotTable, expert_pairs
from workers.native.matrix import Matrix
from workers.native.panels import pack
from workers.native.quantized import pack_weight, unpack_quantized, weight_bytes
from workers.native.thread_team import ThreadTeam
from workers.quantization.formats import WeightFormat
from workers.quantization.rounding import candidates

pytestmark = pytest.mark.heavy

DTYPES = [torch.float32, torch.bfloat16]
FORMATS = [*KNOWN, candidates(KNOWN[-1], 24)[1]]
SHAPES = [(70, 66), (33, 258), (2, 8), (64, 1034)]
"""[out, in]; most are no multiples of a panel, a group or a word."""
NUM_ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 13, 19)


@settings(max_examples=60)
@given(
    rows=st.integers(1, 40),
    half_width=st.integers(1, 100),
    form=st.sampled_from(FORMATS),
    is_gated=st.booleans(),
)
def test_what_is_packed_can_be_unpacked(
    rows: int, half_width: int, form: WeightFormat, is_gated: bool
) -> None:
    shape = (2 * rows if is_gated else rows, 2 * half_width)
    matrix = random_matrix(form, shape)
    packed = pack_weight(library(NAMES[0]), matrix, is_gated)
    assert packed.nbytes == weight_bytes(shape, torch.float32, form, is_gated)
    found = unpack_quantized(library(NAMES[0]), packed, form, shape, is_gated)
    for part, expected in zip(found.parts, matrix.parts, strict=True):
        assert torch.equal(part.view(torch.uint8), expected.view(torch.uint8))


def test_packed_weights_take_as_many_bytes_as_others() -> None:
    """With whole panels, and scales that fill whole cache lines."""
    for form in (form for form in FORMATS if form.group and 3072 % form.group == 0):
        matrix = random_matrix(form, (128, 3072))
        assert pack_weight(library(NAMES[0]), matrix).nbytes == matrix.nbytes


def test_a_plain_weight_is_packed_as_ever() -> None:
    weight = torch.randn(40, 24)
    found = pack_weight(library(NAMES[0]), weight)
    assert torch.equal(found, pack(library(NAMES[0]), weight))
    assert found.nbytes == weight_bytes((40, 24), torch.float32, None)


@pytest.mark.parametrize("form", FORMATS, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_products_are_those_of_the_numbers_that_codes_stand_for(
    name: str, dtype: torch.dtype, shape: tuple[int, int], form: WeightFormat
) -> None:
    """Within the rounding of sums in float, and of the result."""
    weight = random_matrix(form, shape)
    bias = torch.randn(shape[0]).to(dtype)
    matrix = Matrix(team(name, 2), weight, bias, dtype)
    assert torch.equal(matrix.weight(), weight.dequantized().to(dtype))
    x = torch.randn(max(NUM_ROWS), shape[1], generator=torch.Generator().manual_seed(2)).to(dtype)
    exact, numbers = x.double(), weight.dequantized().double()
    expected = exact @ numbers.T + bias.double()
    # What is subtracted for zero points is rounded, too.
    size = exact.abs() @ (numbers.abs().T + 8 * weight.float_scales().amax(1).double()) + 1
    limit = 2e-6 * size + (2**-8 if dtype == torch.bfloat16 else 0) * expected.abs()
    found = matrix.multiply(x)
    assert found.dtype == dtype
    assert ((found.double() - expected).abs() <= limit).all()
    for count in NUM_ROWS:
        assert torch.equal(matrix.multiply(x[:count]), found[:count]), count


@pytest.mark.parametrize("form", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_experts_are_those_of_the_numbers_that_codes_stand_for(
    name: str, dtype: torch.dtype, form: WeightFormat
) -> None:
    """Alone, in batches, with threads: the same bits."""
    shape = ExpertShape(96, 80, 72, dtype, form=form)
    table = SlotTable(shape, 3)
    weights = []
    for slot in range(3):
        own = [random_matrix(form, size, seed=slot) for size in shape.matrices]
        weights.append([matrix.dequantized().double() for matrix in own])
        for i, matrix in enumerate(own):
            table.put(slot, i, pack_weight(library(name), matrix, shape.is_gated(i)))
    inputs = torch.randn(40, 96, generator=torch.Generator().manual_seed(2)).to(dtype)
    slots = torch.arange(40) % 3
    found = expert_pairs(team(name), table, inputs, torch.arange(40), slots)
    for row in (0, 1, 2, 39):
        first, second = weights[row % 3]
        gate, up = (first @ inputs[row].double()).chunk(2)
        expected = second @ (gate * gate.sigmoid() * up).to(dtype).double()
        limit = 2e-5 if dtype == torch.float32 else 0.02
        assert ((found[row].double() - expected).abs() <= limit * (1 + expected.abs())).all()
    for count in (1, 5, 17):
        rows = torch.arange(count)
        part = expert_pairs(ThreadTeam(library(name), 3), table, inputs, rows, slots[:count])
        assert torch.equal(part, found[:count])


@pytest.mark.parametrize("form", FORMATS, ids=name_of)
def test_builds_of_one_arithmetic_give_the_same_bits(form: WeightFormat) -> None:
    """bfloat16 dot products of the processor have an arithmetic of their own."""
    weight = random_matrix(form, (70, 330))
    for dtype in DTYPES:
        names = [n for n in NAMES if dtype == torch.float32 or n != "avx512_bf16"]
        x = torch.randn(9, 330, generator=torch.Generator().manual_seed(3)).to(dtype)
        found = [Matrix(team(name), weight, None, dtype).multiply(x) for name in names]
        assert all(torch.equal(found[0], other) for other in found[1:])


def test_scales_of_e8m0_at_their_ends() -> None:
    """2**-127 is no normal float, and 255 is not a number."""
    form = WeightFormat(codes="e2m1", group=32, scales="e8m0")
    weight = random_matrix(form, (32, 64))
    weight.scales[:, 0] = 0
    weight.scales[5, 1] = 255
    for name in NAMES:
        found = Matrix(team(name), weight, None, torch.float32).multiply(
            torch.full((1, 64), 2.0**100)
        )
        expected = 2.0**100 * weight.dequantized().sum(1)
        assert found[0, 5].isnan()
        others = torch.arange(32) != 5
        assert torch.allclose(found[0, others], expected[others], rtol=1e-5)
