"""Slots of quantized experts: what computes them, and that they are kept and moved as they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cluster.config.model import Quantize
from tests.harness.tiers import quick_values
from tests.reference.goldens import golden_path
from tests.workers.cuda.device import DEVICE
from tests.workers.experts.plain import CLAMPED, GELU, LINEAR, SWIGLU, reference
from tests.workers.native.builds import NAMES, team
from tests.workers.quantization.random import FORMATS, name_of, random_matrix
from workers.experts.bank import ExpertKernel, make_kernel
from workers.experts.kernels_cuda import CudaExperts
from workers.experts.kernels_dequantizing import DequantizingExperts
from workers.experts.kernels_native import NativeExperts
from workers.experts.slots import ExpertSlots, torch_reason
from workers.experts.sources import CheckpointSource
from workers.model.config import ExchangeSpec
from workers.model.loading.checkpoint import Checkpoint
from workers.quantization.formats import WeightFormat
from workers.quantization.matrix import QuantizedMatrix, Weight, parts_of

pytestmark = pytest.mark.heavy

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
PLACES = {"torch": DequantizingExperts, "native": NativeExperts, "cuda": CudaExperts}
KINDS = {"silu": SWIGLU, "clamped": CLAMPED, "linear": LINEAR}


def id_of(value: object) -> str:
    return name_of(value) if isinstance(value, WeightFormat) else str(value)


def weights_of(exchange: ExchangeSpec, slot: int, dtype: torch.dtype) -> list[Weight]:
    """Quantized matrices, and biases."""
    found: list[Weight] = []
    for i, shape in enumerate(exchange.matrix_shapes):
        form = exchange.form_of(i)
        bias = torch.randn(shape, generator=torch.Generator().manual_seed(slot)).to(dtype)
        found.append(bias if form is None else random_matrix(form, shape, seed=10 * slot + i))
    return found


def is_equal(one: Weight, other: Weight) -> bool:
    pairs = zip(parts_of(one), parts_of(other), strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def fill(kernel: ExpertKernel, weights: list[list[Weight]]) -> None:
    kernel.resize(len(weights))
    for slot, own in enumerate(weights):
        for i, weight in enumerate(own):
            kernel.store(slot, i, weight)


def make(place: str, exchange: ExchangeSpec, dtype: torch.dtype) -> ExpertKernel:
    """An empty kernel; without a GPU, Triton's interpreter runs those of GPUs."""
    if place == "cuda":
        return CudaExperts(exchange, dtype, DEVICE)
    kernel = make_kernel(exchange, dtype, CPU, team=team(NAMES[0]) if place == "native" else None)
    assert isinstance(kernel, PLACES[place])
    return kernel


def check_products(
    place: str,
    exchange: ExchangeSpec,
    dtype: torch.dtype,
    limit: float,
    pairs: tuple[list[int], list[int]],
) -> None:
    """``pairs``: input rows and slots."""
    kernel = make(place, exchange, dtype)
    weights = [weights_of(exchange, slot, dtype) for slot in range(4)]
    fill(kernel, weights)
    numbers = [
        [w.dequantized() if isinstance(w, QuantizedMatrix) else w.float() for w in own]
        for own in weights
    ]
    generator = torch.Generator().manual_seed(9)
    inputs = torch.randn(7, exchange.in_width, generator=generator).to(dtype)
    sources, slots = map(torch.tensor, pairs)
    device = DEVICE if place == "cuda" else CPU
    found = kernel.compute(*(x.to(device) for x in (inputs, sources, slots))).cpu()
    expected = reference(inputs, sources, slots, numbers, exchange.activation)
    assert ((found.double() - expected).abs() <= limit * (1 + expected.abs())).all()
    for slot, own in enumerate(weights):
        assert all(is_equal(kernel.read(slot, i), weight) for i, weight in enumerate(own))


@pytest.mark.parametrize(
    ("form", "kind", "dtype"), quick_values(FORMATS, [*KINDS], DTYPES), ids=id_of
)
@pytest.mark.parametrize("place", PLACES)
def test_kernels_equal_plain_products(
    place: str, form: WeightFormat, kind: str, dtype: torch.dtype
) -> None:
    exchange = replace(KINDS[kind], form=form)
    limit = 2e-5 if dtype == torch.float32 else 0.03
    check_products(place, exchange, dtype, limit, ([0, 6, 3, 3, 1, 2], [3, 0, 1, 3, 3, 3]))


@pytest.mark.parametrize(
    "form",
    [f if i in (6, 9) else pytest.param(f, marks=pytest.mark.slow) for i, f in enumerate(FORMATS)],
    ids=name_of,
)
@pytest.mark.parametrize("widths", [(392, 136), pytest.param((512, 384), marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "count",
    [6, pytest.param(40, marks=pytest.mark.slow), pytest.param(300, marks=pytest.mark.slow)],
)
def test_kernels_of_gpus_read_wide_experts(
    widths: tuple[int, int], count: int, form: WeightFormat
) -> None:
    """Several steps a row: one scale for a step, several, or such that begin anywhere."""
    width, inner = widths
    exchange = replace(SWIGLU, in_width=width, out_width=40, expert_width=inner, form=form)
    pairs = [n % 7 for n in range(count)], [n * n % 4 for n in range(count)]
    check_products("cuda", exchange, torch.float32, 2e-4, pairs)


@pytest.mark.parametrize("place", ["torch", "native"])
def test_slots_come_and_go(place: str) -> None:
    exchange = replace(CLAMPED, form=FORMATS[0])
    kernel = make(place, exchange, torch.float32)
    weights = [weights_of(exchange, slot, torch.float32) for slot in range(2)]
    fill(kernel, weights)
    kernel.resize(5)
    kernel.clear(1)
    assert is_equal(kernel.read(0, 0), weights[0][0])
    for empty in (1, 4):
        with pytest.raises(IndexError, match=f"slot {empty} is empty"):
            kernel.read(empty, 0)
    kernel.resize(1)
    assert is_equal(kernel.read(0, 1), weights[0][1])


def test_what_no_kernel_has_is_computed_by_torch() -> None:
    form = FORMATS[0]
    odd = replace(SWIGLU, in_width=23, form=form)
    for exchange in (replace(GELU, form=form), odd):
        kernel = make_kernel(exchange, torch.float32, CPU, team=team(NAMES[0]))
        assert isinstance(kernel, DequantizingExperts)
    banks = Checkpoint(golden_path("olmoe-base", "olmoe"), quantize="int8").family.banks
    assert not torch_reason(banks, torch.float32)
    spec = replace(banks[0], exchanges=(odd,))
    assert "quantized weights of an odd width" in torch_reason([spec], torch.float32)


@pytest.mark.parametrize("place", ["torch", "native"])
def test_rows_do_not_depend_on_each_other(place: str) -> None:
    exchange = replace(SWIGLU, form=FORMATS[4])
    kernel = make(place, exchange, torch.bfloat16)
    fill(kernel, [weights_of(exchange, 0, torch.bfloat16)])
    inputs = torch.randn(9, 24).bfloat16()
    slots = torch.zeros(9, dtype=torch.int64)
    together = kernel.compute(inputs, torch.arange(9), slots)
    for row in range(9):
        alone = kernel.compute(inputs, torch.tensor([row]), slots[:1])
        assert torch.equal(alone[0], together[row])


SETTINGS: tuple[Quantize, ...] = ("int8", "int4")
STORED = {"qwen3moe-fp8": "qwen3moe", "gptoss-official-like": "gptoss"}


@pytest.mark.parametrize("variant", STORED)
def test_experts_are_kept_as_they_are_stored(variant: str) -> None:
    path = golden_path(variant, STORED[variant])
    kept, decoded = Checkpoint(path, quantize="auto"), Checkpoint(path)
    assert all(e.form for bank in kept.family.banks for e in bank.exchanges)
    assert not any(e.form for bank in decoded.family.banks for e in bank.exchanges)
    slots = ExpertSlots(kept.family.banks, 8, torch.float32, CPU, team=team(NAMES[0]))
    plain = ExpertSlots(decoded.family.banks, 8, torch.float32, CPU, team=team(NAMES[0]))
    slots.load_all(kept)
    plain.load_all(decoded)
    for bank in kept.family.banks:
        for expert in range(bank.num_experts):
            one, other = (
                slots.read_expert(bank.index, expert),
                plain.read_expert(bank.index, expert),
            )
            assert one is not None
            assert other is not None
            assert sum(w.nbytes for w in one) == bank.num_bytes(4) < sum(w.nbytes for w in other)
            for weight, expected in zip(one, other, strict=True):
                assert isinstance(expected, Tensor)
                found = weight if isinstance(weight, Tensor) else weight.dequantized()
                assert torch.equal(found, expected)


@pytest.mark.parametrize("setting", SETTINGS)
def test_experts_are_quantized_when_they_are_loaded(setting: Quantize) -> None:
    path = golden_path("olmoe-base", "olmoe")
    source = CheckpointSource(rounded := Checkpoint(path, quantize=setting))
    plain = CheckpointSource(exact := Checkpoint(path))
    pairs = zip(
        source.weights(rounded.family.banks[0], 3, torch.float32),
        plain.weights(exact.family.banks[0], 3, torch.float32),
        strict=True,
    )
    for (exchange, matrix, weight), (_, _, expected) in pairs:
        assert isinstance(weight, QuantizedMatrix)
        assert isinstance(expected, Tensor)
        assert weight.format == rounded.family.banks[0].exchanges[exchange].form_of(matrix)
        error = (weight.dequantized() - expected).norm() / expected.norm()
        assert 0.001 < error < (0.01 if setting == "int8" else 0.15)
    assert source.num_bytes == plain.num_bytes == exact.expert_bytes(exact.family.banks[0], 3)
