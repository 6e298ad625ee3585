"""Weighted sums over experts on the device, against a CPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_check.compare import LIMITS, Worst
from benchmarks.gpu_check.section import Place, Report
from workers.experts.bank import ExpertBank, make_kernel
from workers.experts.kernels_cpu import PaddedExperts
from workers.model.compute_threads import ComputeThreads
from workers.model.config import BankSpec, ExchangeSpec

CPU = torch.device("cpu")
_ROWS = (1, 2, 7, 33, 600)


def specs(place: Place) -> dict[str, BankSpec]:
    """Banks of each kind, by what is special about them."""
    width, inner = place.size(512, 24), place.size(256, 16)
    gated = ExchangeSpec(index=0, name="mlp", in_width=width, out_width=width, expert_width=inner)
    linear = ExchangeSpec(
        index=0, name="query", in_width=width, out_width=inner, expert_kind="linear", weighted=False
    )
    back = ExchangeSpec(
        index=0,
        name="output",
        in_width=inner,
        out_width=width,
        expert_kind="linear",
        per_slot_input=True,
    )
    bank = BankSpec(index=0, bank="mlp", layer=0, num_experts=16, top_k=4, exchanges=(gated,))
    return {
        "silu": bank,
        "float32 weights": replace(bank, float32_weights=True),
        "gelu": replace(bank, exchanges=(replace(gated, activation="gelu"),)),
        "gelu tanh": replace(bank, exchanges=(replace(gated, activation="gelu_pytorch_tanh"),)),
        "relu": replace(bank, exchanges=(replace(gated, activation="relu"),)),
        "one of many": replace(bank, top_k=1),
        "linear": replace(bank, exchanges=(linear,)),
        "linear of pairs": replace(bank, exchanges=(back,)),
    }


def run(place: Place, report: Report) -> None:
    """Every kind of bank, type and number of rows."""
    worst = Worst()
    for dtype in LIMITS:
        for name, spec in specs(place).items():
            with report.part(f"{name} {dtype}"):
                _check(place, report, name, spec, dtype, worst)
    report.value("largest differences", worst.found)
    report.say(worst.words)


def _check(
    place: Place, report: Report, name: str, spec: BankSpec, dtype: torch.dtype, worst: Worst
) -> None:
    ours, known = banks(spec, dtype, place.device)
    for num_rows in _ROWS:
        rows = min(num_rows, place.size(600, 40))
        for has_gaps in (False, True):
            slots, weights = routes(spec, rows, has_gaps)
            what = f"{name}, {rows} rows" + (" with gaps" if has_gaps else "")
            got = outputs(ours, slots.to(place.device), weights.to(place.device), dtype)
            worst.compare(report, what, got, outputs(known, slots, weights, dtype))


def banks(
    spec: BankSpec, dtype: torch.dtype, device: torch.device
) -> tuple[ExpertBank, ExpertBank]:
    """Equal experts on the device and on a CPU."""
    # Padded products, so that a CPU has something else to compare with.
    plain = partial(plain_kernel, threads=ComputeThreads())
    ours = ExpertBank(spec, spec.num_experts, dtype, device, make_kernel)
    known = ExpertBank(spec, spec.num_experts, dtype, CPU, plain)
    generator = torch.Generator().manual_seed(1)
    for slot in range(spec.num_experts):
        for exchange, matrix, shape in spec.matrices:
            weight = (torch.randn(shape, generator=generator) / shape[1] ** 0.5).to(dtype)
            ours.store(slot, exchange, matrix, weight)
            known.store(slot, exchange, matrix, weight.clone())
    return ours, known


def plain_kernel(
    exchange: ExchangeSpec, dtype: torch.dtype, device: torch.device, threads: ComputeThreads
) -> PaddedExperts:
    return PaddedExperts(exchange, dtype, threads)


def routes(spec: BankSpec, num_rows: int, has_gaps: bool) -> tuple[Tensor, Tensor]:
    """Slots [T, k] int64, with ``has_gaps`` some of -1 but not all of a row's, and weights."""
    generator = torch.Generator().manual_seed(num_rows)
    scores = torch.rand(num_rows, spec.num_experts, generator=generator)
    weights, slots = scores.topk(spec.top_k, dim=1)
    if has_gaps and spec.top_k > 1:
        is_gap = torch.rand(slots.shape, generator=generator) < 0.4
        is_gap[:, 1] = False
        slots = slots.masked_fill(is_gap, -1)
    return slots, weights


def outputs(bank: ExpertBank, slots: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    spec = bank.spec.exchanges[0]
    num_rows, top_k = slots.shape
    inputs = num_rows * top_k if spec.per_slot_input else num_rows
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(inputs, spec.in_width, generator=generator).to(slots.device, dtype)
    if spec.weighted:
        return bank.compute_rows(0, x, slots, weights, dtype)
    pairs = (slots.flatten() >= 0).nonzero().squeeze(1)
    return bank.compute(0, x, pairs // top_k, slots.flatten()[pairs])
