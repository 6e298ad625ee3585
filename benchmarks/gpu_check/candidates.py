"""Kernels for the same work side by side: ours, and what torch has.

Another one is a line in ``EXPERTS`` or ``ATTENTION``: a name, and a function that gets ready before
the measurement and returns the call that is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu_check.device import seconds_of
from benchmarks.gpu_check.operators_attention import BLOCK, Paged, Shape
from benchmarks.gpu_check.section import Place, Report
from workers.experts.bank import ExpertBank
from workers.model.config import BankSpec, ExchangeSpec

Call = Callable[[], Tensor]
Case = TypeVar("Case")
DTYPE = torch.bfloat16
_MOST_GATHERED = 4 << 30
"""Bytes of weights that one candidate copies for each row."""


class Unfit(Exception):
    """A candidate is not for this case; the words say why."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionCase:
    """Decode rows over a cache."""

    paged: Paged
    shape: Shape
    context: int

    @property
    def num_bytes(self) -> int:
        """Of the keys and values that are read."""
        rows = len(self.paged.rows[0])
        return 2 * rows * self.context * self.shape.num_kv_heads * self.shape.dim * DTYPE.itemsize


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


def _attend(case: AttentionCase) -> Call:
    """What a server runs, with the writing of keys and values."""
    return case.paged.attend


def _sdpa(case: AttentionCase) -> Call:
    """SDPA over gathered blocks."""
    paged, heads = case.paged, case.shape.num_kv_heads
    tables, layer = paged.tables, paged.cache.layers[0]
    num_rows = len(tables)

    def call() -> Tensor:
        found = layer.index_select(1, tables.flatten()).view(2, heads, num_rows, -1, case.shape.dim)
        keys, values = found.transpose(1, 2).unbind(0)
        queries = paged.rows[0].unsqueeze(2)
        output = functional.scaled_dot_product_attention(
            queries, keys[:, :, : case.context], values[:, :, : case.context], enable_gqa=True
        )
        return output.reshape(num_rows, -1)

    return call


def _varlen(case: AttentionCase) -> Call:
    """torch's attention with a block table, from 2.13 on."""
    from torch.nn.attention.varlen import varlen_attn

    paged, heads = case.paged, case.shape.num_kv_heads
    layer, num_rows = paged.cache.layers[0], len(paged.tables)
    keys, values = layer[:heads].permute(1, 2, 0, 3), layer[heads:].permute(1, 2, 0, 3)
    firsts = torch.arange(num_rows + 1, dtype=torch.int32, device=layer.device)
    lengths = torch.full((num_rows,), case.context, dtype=torch.int32, device=layer.device)
    more: dict[str, Any] = {"seqused_k": lengths, "block_table": paged.tables.int()}
    if case.shape.num_heads != heads:
        more["enable_gqa"] = True

    def call() -> Tensor:
        output = varlen_attn(paged.rows[0], keys, values, firsts, None, 1, case.context, **more)
        assert isinstance(output, Tensor)
        return output.reshape(num_rows, -1)

    return call


EXPERTS: Mapping[str, Callable[[ExpertCase], Call]] = {
    "ours": _bank,
    "grouped_mm": _grouped,
    "gathered bmm": _gathered,
}
"""The first is what the others are compared with."""
ATTENTION: Mapping[str, Callable[[AttentionCase], Call]] = {
    "ours": _attend,
    "gathered SDPA": _sdpa,
    "varlen with a block table": _varlen,
}
"""The same."""


@torch.inference_mode()
def run(place: Place, report: Report) -> None:
    """Every candidate at every size."""
    best = []
    for num_rows in (1, 64, 256, 4096)[: place.size(4, 2)]:
        with report.part(f"experts, {num_rows} rows"):
            experts = expert_case(place, num_rows)
            found = measure(place, EXPERTS, experts, experts.num_bytes)
            report.value(f"experts, {num_rows} rows", found)
            best.append(f"{num_rows}: {_fastest(found)}")
    for num_rows in (1, 64, 256)[: place.size(3, 2)]:
        with report.part(f"attention, {num_rows} rows"):
            attention = attention_case(place, num_rows)
            found = measure(place, ATTENTION, attention, attention.num_bytes)
            report.value(f"attention, {num_rows} rows", found)
            best.append(f"{num_rows}: {_fastest(found)}")
    report.say("fastest " + ", ".join(best))


def measure(
    place: Place, candidates: Mapping[str, Callable[[Case], Call]], case: Case, num_bytes: int
) -> dict[str, Any]:
    """By candidate: time, bytes that it needs a second, difference to the first; or why not."""
    found: dict[str, Any] = {}
    known: Tensor | None = None
    for name, make in candidates.items():
        try:
            call = make(case)
            result = call().float()
            known = result if known is None else known
            seconds = seconds_of(place.device, call, passes=3)
        except Exception as err:  # of another release of torch, or another device
            found[name] = f"{type(err).__name__}: {err}"[:200]
            continue
        off = float((result - known).abs().max())
        found[name] = {"seconds": seconds, "bytes_per_s": num_bytes / seconds, "off": off}
    return found


def _fastest(found: Mapping[str, Any]) -> str:
    times = {n: f["seconds"] for n, f in found.items() if isinstance(f, dict)}
    return min(times, key=lambda name: times[name], default="none")


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
    for expert in range(num_experts):
        bank.store(expert, 0, 0, case.gate_up[expert])
        bank.store(expert, 0, 1, case.down[expert])
    return case


def attention_case(place: Place, num_rows: int) -> AttentionCase:
    """Rows of OLMoE-1B-7B that decode, each with a context of its own."""
    context = place.size(1024, 32)
    shape = Shape(num_heads=16, num_kv_heads=16, dim=place.size(128, 8))
    paged = Paged(shape, [(context, 1)] * num_rows, DTYPE, place.device)
    assert context % BLOCK == 0
    return AttentionCase(paged=paged, shape=shape, context=context)
