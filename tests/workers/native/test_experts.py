"""The experts' kernel against plain products, and to the bit: alone, in any batch, in any build."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.workers.native.builds import NAMES, library, team
from workers.native.experts import ExpertShape, SlotTable, expert_pairs, expert_rows
from workers.native.panels import pack
from workers.native.thread_team import ThreadTeam

pytestmark = pytest.mark.heavy

DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = [(32, 16, 32), (64, 48, 96), (33, 17, 31), (1, 1, 1), (130, 70, 258), (256, 128, 512)]
"""in, inner, out; the third to the fifth are no multiples of anything."""
NUM_SLOTS = 6
EMPTY = 4


@dataclass(frozen=True)
class Experts:
    """Random experts in all slots but ``EMPTY``."""

    shape: ExpertShape
    table: SlotTable
    weights: list[list[Tensor]]
    """[slot][matrix]."""

    def reference(self, row: Tensor, slot: int) -> Tensor:
        """In double precision, with the kernel's rounding of what is between the matrices."""
        first, *rest = (w.double() for w in self.weights[slot])
        row = first @ row.double()
        for second in rest:
            gate, up = row.chunk(2)
            row = second @ (gate * gate.sigmoid() * up).to(self.shape.dtype).double()
        return row


def make(name: str, shape: ExpertShape) -> Experts:
    generator = torch.Generator().manual_seed(3)
    table = SlotTable(shape, NUM_SLOTS)
    weights = []
    for slot in range(NUM_SLOTS):
        own = [
            (torch.randn(size, generator=generator) / size[1] ** 0.5).to(shape.dtype)
            for size in shape.matrices
        ]
        weights.append(own)
        for i, weight in enumerate(own):
            if slot != EMPTY:
                table.put(slot, i, pack(library(name), weight, bool(shape.inner) and not i))
    return Experts(shape, table, weights)


def rows_of(experts: Experts, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, experts.shape.in_width, generator=generator).to(experts.shape.dtype)


def filled_slots(count: int, top_k: int) -> Tensor:
    """[count, top_k] int64: different filled slots in each row."""
    generator = torch.Generator().manual_seed(7)
    filled = torch.tensor([slot for slot in range(NUM_SLOTS) if slot != EMPTY])
    orders = torch.rand(count, len(filled), generator=generator).argsort(1)
    return filled[orders[:, :top_k]]


@pytest.mark.parametrize("is_gated", [True, False], ids=["gated", "linear"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_pairs_equal_plain_products(
    name: str, dtype: torch.dtype, widths: tuple[int, int, int], is_gated: bool
) -> None:
    width, inner, out = widths
    experts = make(name, ExpertShape(width, inner if is_gated else 0, out, dtype))
    for num_rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 140):
        inputs = rows_of(experts, num_rows)
        slots = filled_slots(num_rows, 2).flatten()
        sources = torch.arange(2 * num_rows).flip(0) // 2
        found = expert_pairs(team(name), experts.table, inputs, sources, slots)
        expected = torch.stack(
            [experts.reference(inputs[i], int(s)) for i, s in zip(sources, slots, strict=True)]
        )
        limit = 1e-5 if dtype == torch.float32 else 0.02
        assert found.dtype == dtype
        assert ((found.double() - expected).abs() <= limit * (1 + expected.abs())).all()


@pytest.mark.parametrize("is_gated", [True, False], ids=["gated", "linear"])
@pytest.mark.parametrize("widths", WIDTHS[1:5], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_pair_has_the_same_bits_alone_and_in_any_batch(
    name: str, dtype: torch.dtype, widths: tuple[int, int, int], is_gated: bool
) -> None:
    width, inner, out = widths
    experts = make(name, ExpertShape(width, inner if is_gated else 0, out, dtype))
    inputs = rows_of(experts, 300)
    slots = filled_slots(300, 1).flatten()
    together = expert_pairs(team(name), experts.table, inputs, torch.arange(300), slots)
    for first, last in [(i, i + 1) for i in range(20)] + [(0, 7), (3, 29), (150, 291)]:
        own = torch.arange(first, last)
        found = expert_pairs(team(name), experts.table, inputs, own, slots[own])
        assert torch.equal(found, together[own])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_threads_change_no_bit(name: str, dtype: torch.dtype) -> None:
    experts = make(name, ExpertShape(256, 192, 320, dtype))
    inputs, slots = rows_of(experts, 200), filled_slots(200, 3)
    weights = torch.rand(200, 3)
    found = [
        expert_rows(
            ThreadTeam(library(name), count),
            experts.table,
            inputs,
            slots,
            weights,
            inputs_by="row",
            rounds_products=True,
            dtype=dtype,
        )
        for count in (1, 2, 3, 4)
    ]
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_builds_of_one_arithmetic_give_the_same_bits(dtype: torch.dtype) -> None:
    """bfloat16 dot products of the processor have an arithmetic of their own."""
    names = [n for n in NAMES if dtype == torch.float32 or n != "avx512_bf16"]
    found = []
    for name in names:
        experts = make(name, ExpertShape(96, 80, 72, dtype))
        slots = filled_slots(50, 1).flatten()
        inputs = rows_of(experts, 50)
        found.append(expert_pairs(team(name), experts.table, inputs, torch.arange(50), slots))
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("sums_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounds_products", [True, False])
@pytest.mark.parametrize("inputs_by", ["row", "place", "pair"])
@pytest.mark.parametrize("name", NAMES)
def test_sums_are_those_of_torch_over_the_same_pairs(
    name: str, inputs_by: str, rounds_products: bool, sums_dtype: torch.dtype
) -> None:
    experts = make(name, ExpertShape(48, 33, 50, torch.bfloat16))
    slots = filled_slots(21, 4)
    slots[3] = -1
    slots[5, 1] = slots[8, 0] = slots[20, 3] = -1
    weights = torch.rand(21, 8)[:, 3:7]  # rows that do not follow each other
    pairs = (slots.flatten() >= 0).nonzero().squeeze(1)
    num_inputs = {"row": 21, "place": 84, "pair": len(pairs)}[inputs_by]
    inputs = rows_of(experts, num_inputs)
    sources = {"row": pairs // 4, "place": pairs, "pair": torch.arange(len(pairs))}[inputs_by]
    outputs = expert_pairs(team(name), experts.table, inputs, sources, slots.flatten()[pairs])
    factors = weights.flatten()[pairs].unsqueeze(1)
    products = outputs * (factors.bfloat16() if rounds_products else factors)
    expected = torch.zeros(21, 50).index_add_(0, pairs // 4, products.float())
    found = expert_rows(
        team(name),
        experts.table,
        inputs,
        slots,
        weights,
        inputs_by=inputs_by,  # type: ignore[arg-type]
        rounds_products=rounds_products,
        dtype=sums_dtype,
    )
    assert torch.equal(found, expected.to(sums_dtype))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_calls_larger_than_a_pass_equal_their_parts(name: str, count: int) -> None:
    experts = make(name, ExpertShape(16, 16, 16, torch.bfloat16))
    members = ThreadTeam(library(name), count)
    slots = filled_slots(9000, 2)
    slots[::7, 0] = -1
    weights = torch.rand(9000, 2)
    num_pairs = (slots >= 0).sum(1).cumsum(0)
    inputs = rows_of(experts, int(num_pairs[-1]))

    def compute(first: int, last: int) -> Tensor:
        begin, end = int(num_pairs[first - 1]) if first else 0, int(num_pairs[last - 1])
        part = slice(first, last)
        return expert_rows(
            members,
            experts.table,
            inputs[begin:end],
            slots[part],
            weights[part],
            inputs_by="pair",
            rounds_products=True,
            dtype=torch.bfloat16,
        )

    parts = [compute(first, min(first + 700, 9000)) for first in range(0, 9000, 700)]
    assert torch.equal(compute(0, 9000), torch.cat(parts))
    flat = slots.flatten()
    flat = flat[flat >= 0]
    whole = expert_pairs(members, experts.table, inputs, torch.arange(len(flat)), flat)
    part = expert_pairs(members, experts.table, inputs, torch.arange(8100, 9100), flat[8100:9100])
    assert torch.equal(whole[8100:9100], part)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_a_number_stays_in_its_row(name: str) -> None:
    experts = make(name, ExpertShape(32, 16, 32, torch.bfloat16))
    inputs, slots = rows_of(experts, 9), filled_slots(9, 1).flatten()
    expected = expert_pairs(team(name), experts.table, inputs, torch.arange(9), slots)
    inputs[4, 7] = float("nan")
    found = expert_pairs(team(name), experts.table, inputs, torch.arange(9), slots)
    assert found[4].isnan().all()
    others = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8])
    assert torch.equal(found[others], expected[others])


@pytest.mark.parametrize("name", NAMES)
def test_rows_without_experts_have_sums_of_zero(name: str) -> None:
    experts = make(name, ExpertShape(32, 16, 32, torch.float32))
    slots = torch.full((3, 2), -1)
    found = expert_rows(
        team(name),
        experts.table,
        rows_of(experts, 3),
        slots,
        torch.rand(3, 2),
        inputs_by="row",
        rounds_products=False,
        dtype=torch.float32,
    )
    assert torch.equal(found, torch.zeros(3, 32))
    none = torch.empty(0, dtype=torch.int64)
    assert expert_pairs(team(name), experts.table, rows_of(experts, 3), none, none).shape == (0, 32)


@pytest.mark.parametrize(("source", "slot"), [(0, EMPTY), (0, NUM_SLOTS), (0, -2), (3, 0), (-1, 0)])
def test_missing_slots_and_inputs_are_errors(source: int, slot: int) -> None:
    experts = make(NAMES[0], ExpertShape(32, 16, 32, torch.float32))
    one = torch.ones(1, dtype=torch.int64)
    with pytest.raises(IndexError):
        expert_pairs(team(NAMES[0]), experts.table, rows_of(experts, 3), one * source, one * slot)
    usable = expert_pairs(team(NAMES[0]), experts.table, rows_of(experts, 3), one, one)
    assert usable.shape == (1, 32)


@pytest.mark.parametrize("is_gated", [True, False], ids=["gated", "linear"])
def test_a_slot_without_its_biases_is_an_error(is_gated: bool) -> None:
    shape = ExpertShape(32, 16 if is_gated else 0, 32, torch.float32, has_bias=True)
    table, one = SlotTable(shape, 2), torch.ones(1, dtype=torch.int64)
    for i, size in enumerate(shape.matrices):
        gated = shape.is_gated(i)
        for slot in range(2 if i < len(shape.matrices) - 1 else 1):
            table.put(slot, i, pack(library(NAMES[0]), torch.ones(size), gated))
    rows = torch.ones(1, 32)
    assert expert_pairs(team(NAMES[0]), table, rows, one * 0, one * 0).isfinite().all()
    with pytest.raises(IndexError):
        expert_pairs(team(NAMES[0]), table, rows, one * 0, one)


def test_tensors_of_another_type_or_shape_are_refused() -> None:
    experts = make(NAMES[0], ExpertShape(32, 16, 32, torch.float32))
    one = torch.ones(1, dtype=torch.int64)
    rows = rows_of(experts, 3)
    for inputs, sources, slots in (
        (rows.bfloat16(), one, one),
        (rows[:, :31], one, one),
        (rows, one.int(), one),
        (rows, one, one.int()),
        (torch.randn(32, 3).t(), one, one),
    ):
        with pytest.raises(AssertionError):
            expert_pairs(team(NAMES[0]), experts.table, inputs, sources, slots)
