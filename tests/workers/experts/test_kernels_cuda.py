"""Expert kernels of GPUs against plain products. Without a GPU, Triton's interpreter runs ours."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.harness.tiers import quick_rows
from tests.workers.cuda.device import DEVICE
from tests.workers.experts.plain import (
    CLAMPED,
    GELU,
    LINEAR,
    RELU,
    SWIGLU,
    TANH,
    reference,
    weights,
)
from workers.cuda.row_sums import sum_rows
from workers.experts.bank import ExpertBank
from workers.experts.kernels_cuda import CudaExperts
from workers.model.config import BankSpec, ExchangeSpec
from workers.model.weighting import weighted_sum

pytestmark = pytest.mark.heavy

LIMITS = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.05}
SLOW = pytest.mark.slow


def filled(
    exchange: ExchangeSpec, dtype: torch.dtype, num_slots: int = 8
) -> tuple[CudaExperts, list[list[Tensor]]]:
    """A kernel, and its weights."""
    matrices = weights(exchange, num_slots, dtype)
    kernel = CudaExperts(exchange, dtype, DEVICE)
    kernel.resize(num_slots)
    for slot, own in enumerate(matrices):
        for i, matrix in enumerate(own):
            kernel.store(slot, i, matrix)
    return kernel, matrices


def drawn_pairs(load: str) -> tuple[int, Tensor]:
    """A number of input rows, and the slots of pairs."""
    generator = torch.Generator().manual_seed(2)
    return {
        "one row": (1, torch.tensor([6, 1])),
        "spread": (9, torch.randint(0, 8, (45,), generator=generator)),
        "one expert": (7, torch.full((40,), 3)),
        "skewed": (60, torch.cat((torch.full((60,), 5), torch.tensor([0, 1, 2, 3, 4, 6, 7])))),
        "wide": (200, torch.randint(0, 2, (200,), generator=generator)),
    }[load]


def check_products(
    kernel: CudaExperts,
    exchange: ExchangeSpec,
    dtype: torch.dtype,
    load: str,
    matrices: list[list[Tensor]],
) -> None:
    num_rows, pair_slot = drawn_pairs(load)
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(num_rows, exchange.in_width, generator=generator).to(dtype)
    pair_input = torch.randint(0, num_rows, pair_slot.shape, generator=generator)
    found = kernel.compute(*(x.to(DEVICE) for x in (inputs, pair_input, pair_slot))).cpu()
    expected = reference(inputs, pair_input, pair_slot, matrices, exchange.activation)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() < LIMITS[dtype]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("exchange", [SWIGLU, LINEAR, CLAMPED], ids=["gated", "linear", "clamped"])
@pytest.mark.parametrize(
    "load",
    ["one row", "spread", *(pytest.param(x, marks=SLOW) for x in ("one expert", "skewed", "wide"))],
)
def test_kernel_equals_plain_products(
    exchange: ExchangeSpec, dtype: torch.dtype, load: str
) -> None:
    kernel, matrices = filled(exchange, dtype)
    check_products(kernel, exchange, dtype, load, matrices)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=SLOW)], ids=str)
@pytest.mark.parametrize("exchange", [GELU, TANH, RELU], ids=["gelu", "tanh", "relu"])
def test_each_activation(exchange: ExchangeSpec, dtype: torch.dtype) -> None:
    kernel, matrices = filled(exchange, dtype)
    check_products(kernel, exchange, dtype, "spread", matrices)


@SLOW
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("widths", [(256, 64, 256), (200, 136, 72), (513, 33, 129)], ids=str)
@pytest.mark.parametrize("load", ["one row", "spread", "skewed", "wide"])
def test_wide_experts(widths: tuple[int, int, int], dtype: torch.dtype, load: str) -> None:
    in_width, inner, out_width = widths
    exchange = replace(SWIGLU, in_width=in_width, expert_width=inner, out_width=out_width)
    kernel, matrices = filled(exchange, dtype)
    check_products(kernel, exchange, dtype, load, matrices)


def test_an_expert_whose_matrices_need_several_tiles() -> None:
    exchange = replace(SWIGLU, in_width=136, expert_width=40, out_width=72)
    kernel, matrices = filled(exchange, torch.bfloat16)
    check_products(kernel, exchange, torch.bfloat16, "spread", matrices)


@pytest.mark.parametrize("num_pairs", [65, 129, pytest.param(1300, marks=SLOW)])
def test_blocks_of_many_pairs_are_higher(num_pairs: int) -> None:
    """Of one slot: 128 rows at once, of which the last block has few. 1,300: counted by tile."""
    kernel, matrices = filled(SWIGLU, torch.bfloat16, 1)
    inputs = torch.randn(num_pairs, 24, generator=torch.Generator().manual_seed(6)).bfloat16()
    places, slots = torch.arange(num_pairs).flip(0), torch.zeros(num_pairs, dtype=torch.int64)
    found = kernel.compute(*(x.to(DEVICE) for x in (inputs, places, slots))).cpu()
    expected = reference(inputs, places, slots, matrices, "silu")
    off = (found.double() - expected).abs().max() / expected.abs().max()
    assert off < LIMITS[torch.bfloat16]


@pytest.mark.parametrize("num_rows", [5, pytest.param(30, marks=SLOW)])
@pytest.mark.parametrize("per_slot_input", [False, True])
@pytest.mark.parametrize("float32_weights", quick_rows({True}, [False, True]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_of_rows_are_those_of_their_pairs(
    dtype: torch.dtype, float32_weights: bool, per_slot_input: bool, num_rows: int
) -> None:
    exchange = replace(SWIGLU, per_slot_input=per_slot_input)
    spec = BankSpec(
        index=0,
        bank="mlp",
        layer=0,
        num_experts=4,
        top_k=3,
        exchanges=(exchange,),
        float32_weights=float32_weights,
    )
    kernel, _ = filled(exchange, dtype, 4)
    bank = ExpertBank(spec, 4, dtype, DEVICE, lambda *_: kernel)
    generator = torch.Generator().manual_seed(4)
    slots = torch.rand(num_rows, 4, generator=generator).argsort(1)[:, :3]
    slots[2, 1] = slots[0, 0] = -1
    slots[4] = -1
    factors = torch.rand(num_rows, 3, generator=generator)
    pairs = (slots.flatten() >= 0).nonzero().squeeze(1)
    inputs = torch.randn(3 * num_rows if per_slot_input else num_rows, 24, generator=generator)
    inputs = inputs.to(dtype)
    sources = pairs if per_slot_input else pairs // 3
    moved = (x.to(DEVICE) for x in (inputs, sources, slots.flatten()[pairs]))
    outputs = bank.compute(0, *moved).cpu()
    own_factors = factors.flatten()[pairs]
    expected = weighted_sum(outputs, own_factors, pairs // 3, num_rows, float32_weights)
    sent = torch.cat((slots, factors.view(torch.int32).long()), 1).to(DEVICE)
    for kind in (torch.float32, dtype):  # the slots are part of longer rows, as received ones are
        found = bank.compute_rows(0, inputs.to(DEVICE), sent[:, :3], factors.to(DEVICE), kind)
        assert torch.equal(found.cpu(), expected.to(kind))
    narrow = factors.to(DEVICE, dtype)
    found, wide = (
        bank.compute_rows(0, inputs.to(DEVICE), slots.to(DEVICE), own, dtype)
        for own in (narrow, narrow.float())
    )
    assert torch.equal(found, wide)
    if per_slot_input:  # only the inputs of pairs
        own = inputs[pairs].to(DEVICE)
        found = bank.compute_rows(0, own, slots.to(DEVICE), factors.to(DEVICE), dtype)
        assert torch.equal(found.cpu(), expected.to(dtype))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("rounds", [False, True])
def test_a_sum_is_that_of_weighting_to_the_last_bit(dtype: torch.dtype, rounds: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    outputs = (10 * torch.randn(21, 40, generator=generator)).to(dtype)
    slots = torch.randint(-1, 3, (7, 3), generator=generator)
    factors = torch.rand(7, 3, generator=generator)
    has_slot = slots.flatten() >= 0
    outputs[~has_slot] = torch.nan  # nobody has written there
    rows = torch.arange(7).repeat_interleave(3)[has_slot]
    own = outputs[has_slot], factors.flatten()[has_slot]
    expected = weighted_sum(*own, rows, 7, float32_weights=not rounds)
    outputs, slots, factors = (x.to(DEVICE) for x in (outputs, slots, factors))
    found = sum_rows(outputs, slots, factors, rounds, torch.float32)
    assert torch.equal(found.cpu(), expected)


def test_nan_of_an_input_reaches_its_row_alone() -> None:
    """A row that is not finite ends its own request."""
    kernel, _ = filled(RELU, torch.float32)
    inputs = torch.ones(10, 24)
    inputs[3, 5] = torch.nan
    slots = torch.arange(20).view(10, 2) % 8
    found = kernel.compute_rows(
        inputs.to(DEVICE), slots.to(DEVICE), torch.ones(10, 2).to(DEVICE), False, torch.float32
    )
    assert found.cpu().isnan().all(1).nonzero().flatten().tolist() == [3]
    assert found.cpu().isnan().any(1).sum() == 1
