"""Candidates for a layer's experts: ours, and what torch has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu_check.candidates_measure import DTYPE, Call, Unfit
from benchmarks.gpu_check.device import synchronize
from benchmarks.gpu_check.section import Place
from workers.experts.bank import ExpertBank
from workers.model.config import BankSpec, ExchangeSpec

_MOST_GATHERED = 4 << 30
"""Bytes of weights that one candidate copies for each row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertCase:
    """The experts of a layer, and rows for them."""

    bank: ExpertBank
    gate_up: Tensor
    """[E, 2 * I, H]."""
    down: Tensor
    """[E, H, I]."""
    rows: Tensor
    """[T, H]."""
    slots: Tensor
    """[T, k]."""
    weights: Tensor
    """[T, k] float32."""

    @property
    def num_bytes(self) -> int:
        """Of the weights that are needed."""
        used = len(set(self.slots.flatten().tolist()))
        return used * (self.gate_up[0].nbytes + self.down[0].nbytes)


def _bank(case: ExpertCase) -> Call:
    """What a server runs."""
    return partial(case.bank.compute_rows, 0, case.rows, case.slots, case.weights, DTYPE)


def _activated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate) * up


def _grouped(case: ExpertCase) -> Call:
    """``grouped_mm`` of rows sorted by expert."""
    num_rows, top_k = case.slots.shape
    experts = torch.arange(len(case.gate_up), device=case.rows.device)

    def call() -> Tensor:
        places, order = case.slots.flatten().sort()
        ends = torch.searchsorted(places, experts, right=True, out_int32=True)
        rows = case.rows[order // top_k]
        inner = _activated(functional.grouped_mm(rows, case.gate_up.transpose(1, 2), offs=ends))
        outputs = functional.grouped_mm(inner, case.down.transpose(1, 2), offs=ends)
        pairs = torch.empty_like(outputs)
        pairs[order] = outputs
        by_row = pairs.view(num_rows, top_k, -1) * case.weights.to(DTYPE).unsqueeze(2)
        return by_row.float().sum(1).to(DTYPE)

    return call


def _gathered(case: ExpertCase) -> Call:
    """A copy of the weights for each pair, and batched products."""
    slots = case.slots.flatten()
    if len(slots) * (case.gate_up[0].nbytes + case.down[0].nbytes) > _MOST_GATHERED:
        raise Unfit("copies of the weights are too large")
    num_rows, top_k = case.slots.shape

    def call() -> Tensor:
        rows = case.rows.repeat_interleave(top_k, 0).unsqueeze(2)
        inner = torch.bmm(case.gate_up[slots], rows).transpose(1, 2)
        outputs = torch.bmm(case.down[slots], _activated(inner).transpose(1, 2))
        by_row = outputs.view(num_rows, top_k, -1) * case.weights.to(DTYPE).unsqueeze(2)
        return by_row.float().sum(1).to(DTYPE)

    return call


EXPERTS: Mapping[str, Callable[[ExpertCase], Call]] = {
    "ours": _bank,
    "grouped_mm": _grouped,
    "gathered bmm": _gathered,
}
"""The first is what the others are compared with."""


def expert_case(place: Place, num_rows: int) -> ExpertCase:
    """A layer of OLMoE-1B-7B."""
    device = place.device
    width, inner, num_experts = place.size(2048, 16), place.size(1024, 8), place.size(64, 8)
    top_k = place.size(8, 2)
    exchange = ExchangeSpec(
        index=0, name="mlp", in_width=width, out_width=width, expert_width=inner
    )
    spec = BankSpec(
        index=0,
        bank="mlp",
        layer=0,
        num_experts=num_experts,
        top_k=top_k,
        exchanges=(exchange,),
    )
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        numbers = torch.randn(shape, device=device, generator=generator)
        return numbers.div(shape[-1] ** 0.5).to(DTYPE)

    bank = ExpertBank(spec, num_experts, DTYPE, device)
    case = ExpertCase(
        bank=bank,
        gate_up=draw(num_experts, 2 * inner, width),
        down=draw(num_experts, width, inner),
        rows=draw(num_rows, width) * width**0.5,
        slots=torch.rand(num_rows, num_experts, device=device).topk(top_k, dim=1).indices,
        weights=torch.rand(num_rows, top_k, device=device) / top_k,
    )
    synchronize(device)  # the bank reads them on a stream of its own
    for expert in range(num_experts):
        bank.store(expert, 0, 0, case.gate_up[expert])
        bank.store(expert, 0, 1, case.down[expert])
    return case
