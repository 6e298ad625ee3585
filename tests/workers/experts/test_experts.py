"""Expert kernels against plain products: every kernel, load and count of rows."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from cluster.core.placement import BankShape, contiguous
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
from tests.workers.native.builds import NAMES, team
from workers.experts.bank import ExpertBank, ExpertKernel, make_kernel
from workers.experts.kernels_cpu import PackedExperts, PaddedExperts
from workers.experts.kernels_invariant import BlockExperts, LoopExperts
from workers.experts.kernels_native import NativeExperts, unsupported_feature
from workers.experts.slots import ExpertSlots, torch_reason
from workers.model.batch_invariant.invariant import LINEAR_FORMS
from workers.model.compute_threads import ComputeThreads
from workers.model.config import BankSpec, ExchangeSpec
from workers.model.loading.checkpoint import Checkpoint
from workers.model.weighting import weighted_sum
from workers.quantization.matrix import plain

pytestmark = pytest.mark.heavy

CPU = torch.device("cpu")
KINDS = ["packed", "padded", "blocks", "loop 0", "loop 1", "loop 2", "native"]


def make(kind: str, exchange: ExchangeSpec, dtype: torch.dtype) -> ExpertKernel:
    if kind == "blocks":
        return BlockExperts(exchange, dtype, CPU)
    if kind.startswith("loop"):
        return LoopExperts(exchange, dtype, CPU, form=LINEAR_FORMS[int(kind[-1])])
    if kind == "native":
        return NativeExperts(exchange, dtype, team(NAMES[0], 2))
    kernel = PackedExperts if kind == "packed" else PaddedExperts
    return kernel(exchange, dtype, ComputeThreads(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "exchange",
    [SWIGLU, GELU, TANH, RELU, LINEAR, CLAMPED],
    ids=["silu", "gelu", "gelu_pytorch_tanh", "relu", "linear", "clamped"],
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("load", ["one row", "spread", "one expert", "skewed", "wide"])
def test_kernel_equals_plain_products(
    kind: str, exchange: ExchangeSpec, dtype: torch.dtype, load: str
) -> None:
    num_slots = 8
    matrices = weights(exchange, num_slots, dtype)
    if kind == "native" and unsupported_feature(exchange, dtype):
        assert not isinstance(make_kernel(exchange, dtype, CPU, team=team(NAMES[0])), NativeExperts)
        return
    kernel = make(kind, exchange, dtype)
    kernel.resize(num_slots)
    for slot, own in enumerate(matrices):
        for i, matrix in enumerate(own):
            kernel.store(slot, i, matrix.clone())
            assert torch.equal(plain(kernel.read(slot, i)), matrix)
    generator = torch.Generator().manual_seed(2)
    num_rows, pair_slot = {
        "one row": (1, torch.tensor([6, 1])),
        "spread": (9, torch.randint(0, num_slots, (27,), generator=generator)),
        "one expert": (7, torch.full((7,), 3)),
        "skewed": (60, torch.cat((torch.full((60,), 5), torch.tensor([0, 1, 2, 3, 4, 6, 7])))),
        "wide": (200, torch.randint(0, 2, (200,), generator=generator)),
    }[load]
    inputs = torch.randn(num_rows, exchange.in_width, generator=generator).to(dtype)
    pair_input = torch.randint(0, num_rows, pair_slot.shape, generator=generator)
    found = kernel.compute(inputs, pair_input, pair_slot)
    expected = reference(inputs, pair_input, pair_slot, matrices, exchange.activation)
    assert found.dtype == dtype
    assert found.shape == (len(pair_slot), exchange.out_width)
    limit = 1e-5 if dtype == torch.float32 else 0.05
    assert (found.double() - expected).abs().max() < limit


@pytest.mark.parametrize(
    ("inner", "own_team"),
    [(16, None), (1400, None), (16, "native")],
    ids=["padded", "packed", "native"],
)
def test_bank_grows_and_empties(inner: int, own_team: str | None) -> None:
    exchange = ExchangeSpec(index=0, name="mlp", in_width=24, out_width=24, expert_width=inner)
    spec = BankSpec(index=0, bank="mlp", layer=0, num_experts=4, top_k=2, exchanges=(exchange,))
    made = partial(make_kernel, team=team(NAMES[0], 2)) if own_team else make_kernel
    bank = ExpertBank(spec, 2, torch.float32, CPU, made)
    matrices = weights(exchange, 4, torch.float32)
    for i, matrix in enumerate(matrices[0]):
        bank.store(1, 0, i, matrix.clone())
    inputs = torch.randn(3, 24)
    rows = torch.arange(3)
    before = bank.compute(0, inputs, rows, torch.ones(3, dtype=torch.int64))
    bank.resize(5)
    for i, matrix in enumerate(matrices[3]):
        bank.store(4, 0, i, matrix.clone())
    assert torch.equal(bank.compute(0, inputs, rows, torch.ones(3, dtype=torch.int64)), before)
    found = bank.compute(0, inputs, rows, torch.tensor([1, 4, 4]))
    own = [matrices[0]] * 4 + [matrices[3]]
    expected = reference(inputs, rows, torch.tensor([1, 4, 4]), own)
    assert (found.double() - expected).abs().max() < 1e-5
    bank.clear(4)
    assert bank.num_slots == 5
    bank.resize(2)
    assert bank.num_slots == 2
    assert torch.equal(bank.compute(0, inputs, rows, torch.ones(3, dtype=torch.int64)), before)
    with pytest.raises(IndexError):
        bank.read(4, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_can_be_read_again(kind: str, dtype: torch.dtype) -> None:
    wide = replace(SWIGLU, in_width=256, out_width=256, expert_width=192)
    matrices = weights(wide, 3, dtype)
    kernel = make(kind, wide, dtype)
    kernel.resize(3)
    for slot, own in enumerate(matrices):
        for i, matrix in enumerate(own):
            kernel.store(slot, i, matrix.clone())
    for slot, own in enumerate(matrices):
        for i, matrix in enumerate(own):
            found = plain(kernel.read(slot, i))
            assert torch.equal(found, matrix)
            found.zero_()
            assert torch.equal(plain(kernel.read(slot, i)), matrix)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bank_on_a_gpu_equals_the_cpu(dtype: torch.dtype) -> None:
    spec = BankSpec(index=0, bank="mlp", layer=0, num_experts=8, top_k=2, exchanges=(SWIGLU,))
    banks = [ExpertBank(spec, 8, dtype, torch.device(d)) for d in ("cpu", "cuda")]
    for slot, own in enumerate(weights(SWIGLU, 8, dtype)):
        for i, matrix in enumerate(own):
            for bank in banks:
                bank.store(slot, 0, i, matrix)
    inputs = torch.randn(9, 24).to(dtype)
    pairs = torch.randint(0, 9, (27,)), torch.randint(0, 8, (27,))
    on_cpu = banks[0].compute(0, inputs, *pairs)
    on_gpu = banks[1].compute(0, inputs.cuda(), *(p.cuda() for p in pairs))
    assert (on_gpu.cpu() - on_cpu).abs().max() < (1e-3 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("per_slot_input", [False, True])
@pytest.mark.parametrize("float32_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own_team", [None, "native"])
def test_sums_of_rows_are_those_of_their_pairs(
    own_team: str | None, dtype: torch.dtype, float32_weights: bool, per_slot_input: bool
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
    made = partial(make_kernel, team=team(NAMES[0], 2)) if own_team else make_kernel
    bank = ExpertBank(spec, 4, dtype, CPU, made)
    for slot, own in enumerate(weights(exchange, 4, dtype)):
        for i, matrix in enumerate(own):
            bank.store(slot, 0, i, matrix)
    slots = torch.stack([torch.randperm(4)[:3] for _ in range(9)])
    slots[2, 1] = slots[5, 0] = -1
    slots[7] = -1
    factors = torch.rand(9, 3)
    pairs = (slots.flatten() >= 0).nonzero().squeeze(1)
    inputs = torch.randn(27 if per_slot_input else 9, 24).to(dtype)
    sources = pairs if per_slot_input else pairs // 3
    outputs = bank.compute(0, inputs, sources, slots.flatten()[pairs])
    own_factors = factors.flatten()[pairs]
    expected = weighted_sum(outputs, own_factors, pairs // 3, 9, float32_weights)
    for kind in (torch.float32, dtype):
        found = bank.compute_rows(0, inputs, slots, factors, kind)
        assert torch.equal(found, expected.to(kind))
    if per_slot_input:  # only the inputs of pairs
        found = bank.compute_rows(0, inputs[pairs], slots, factors, dtype)
        assert torch.equal(found, expected.to(dtype))


def test_the_compiled_kernel_is_taken_where_there_is_a_team() -> None:
    made = make_kernel(SWIGLU, torch.bfloat16, CPU, team=team(NAMES[0]))
    assert isinstance(made, NativeExperts)
    assert not isinstance(make_kernel(SWIGLU, torch.bfloat16, CPU), NativeExperts)
    made = make_kernel(SWIGLU, torch.float16, CPU, team=team(NAMES[0]))
    assert not isinstance(made, NativeExperts)


def test_no_pairs_no_rows() -> None:
    spec = BankSpec(index=0, bank="mlp", layer=0, num_experts=2, top_k=1, exchanges=(LINEAR,))
    bank = ExpertBank(spec, 2, torch.float32, CPU)
    none = torch.empty(0, dtype=torch.int64)
    assert bank.compute(0, torch.zeros(3, 24), none, none).shape == (0, 40)


def test_placement_fills_its_slots_only(tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint(tiny_checkpoint)
    banks = checkpoint.family.banks
    shapes = [BankShape(bank=b.bank, layer=b.layer, num_experts=b.num_experts) for b in banks]
    placement = contiguous(shapes, num_devices=3, num_redundant=1)
    whole = ExpertSlots(banks, 8, torch.float32, CPU)
    whole.load_all(checkpoint)
    inputs = torch.randn(1, 32)
    zero = torch.zeros(1, dtype=torch.int64)
    for device in range(3):
        slots = ExpertSlots(banks, 2, torch.float32, CPU)  # grows to what is placed
        slots.load_placement(placement, device, checkpoint)
        for bank, maps in enumerate(placement.banks):
            held = maps.physical_to_logical[device]
            assert slots.banks[bank].num_slots == len(held)
            for slot, expert in enumerate(held):
                if expert < 0:
                    continue
                got = slots.banks[bank].compute(0, inputs, zero, zero + slot)
                want = whole.banks[bank].compute(0, inputs, zero, zero + expert)
                assert torch.allclose(got, want, atol=1e-6)


def test_experts_that_torch_computes_are_named() -> None:
    def banks(*exchanges: ExchangeSpec) -> list[BankSpec]:
        return [BankSpec(index=0, bank="mlp", layer=0, num_experts=4, top_k=2, exchanges=exchanges)]

    assert torch_reason(banks(SWIGLU, LINEAR), torch.bfloat16) == ""
    float16 = torch_reason(banks(SWIGLU), torch.float16)
    assert float16 == "torch for experts: no kernel has float16"
    others = torch_reason(banks(SWIGLU, GELU, RELU, GELU), torch.bfloat16)
    words = "no kernel has the activation gelu and the activation relu"
    assert others == f"torch for experts: {words}"
