"""Speed of quantized experts: a layer's experts alone, and decode steps of OLMoE-1B-7B's shape.

Weights are random. The bound of a step is as for ``speed``. A layer's experts are multiplied with
other rows in turns, so that codes come from memory and not from the L2 cache, and are replayed from
a CUDA graph: a launch takes longer than they do for a row.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.checkpoints.random_checkpoint import TINY
from benchmarks.checkpoints.random_codes import draw_matrix
from benchmarks.gpu_check.ceilings import copy_bandwidth, read_bandwidth
from benchmarks.gpu_check.code_formats import MAIN
from benchmarks.gpu_check.device import captured, seconds_of, synchronize
from benchmarks.gpu_check.section import Place, Report
from benchmarks.gpu_check.speed import OLMOE, Run, fill, make_engine
from benchmarks.gpu_check.step_costs import cost_of_steps, median_step_s, steps
from benchmarks.memory_wall.bounds import step_weight_bytes
from workers.experts.bank import ExpertBank
from workers.model.config import BankSpec, ExchangeSpec
from workers.quantization.formats import WeightFormat

_DTYPE = torch.bfloat16
_FORMS: Mapping[str, WeightFormat | None] = {"bfloat16": None, **MAIN}
_BATCHES = (1, 8, 64)
_ROWS = (1, 8, 64, 4096)
_TURNS = 8
"""Turns of a call, each with separate rows and slots."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rates:
    """Rates of the device in bytes a second."""

    read: float
    copy: float


def run(place: Place, report: Report) -> None:
    """Measure experts alone, then whole steps, in each format."""
    rates = _Rates(
        read=read_bandwidth(place.device, place.size(2 << 30, 1 << 20)),
        copy=copy_bandwidth(place.device, place.size(2 << 30, 1 << 20)),
    )
    report.value("read_bytes_per_s", rates.read)
    report.value("copy_bytes_per_s", rates.copy)
    busy_s: dict[str, dict[int, float]] = {}
    for name, form in _FORMS.items():
        with report.part(f"experts in {name}"):
            report.value(f"experts in {name}", _experts(place, form))
        with report.part(f"steps in {name}"):
            found = _steps(place, form, rates)
            report.value(f"steps in {name}", found)
            busy_s[name] = {batch: own["busy_s"] for batch, own in found.items()}
            report.say(_words(busy_s))


def _words(busy_s: Mapping[str, Mapping[int, float]]) -> str:
    """Summary such as ``kernels faster than bfloat16's, batch 1 / 8: int8 1.5 / 1.4``."""
    plain = busy_s["bfloat16"]
    parts = [
        f"{name} " + " / ".join(f"{plain[batch] / own:.1f}" for batch, own in found.items())
        for name, found in busy_s.items()
        if name != "bfloat16"
    ]
    batches = " / ".join(map(str, plain))
    return f"kernels faster than bfloat16's, batch {batches}: {', '.join(parts)}"


def _experts(place: Place, form: WeightFormat | None) -> dict[int, dict[str, float]]:
    """Time of a layer's experts, and bytes and operations a second, by number of rows."""
    bank = _bank(place, form)
    found = {}
    for num_rows in _ROWS[: place.size(len(_ROWS), 2)]:
        call, num_bytes = _turns(place, bank, num_rows)
        replay = captured(place.device, call)[0].replay if place.is_gpu else call
        seconds = seconds_of(place.device, replay, passes=3, calls=place.size(4, 1))
        seconds /= place.size(_TURNS, 1)
        pairs = num_rows * bank.spec.top_k
        operations = 2 * pairs * sum(a * b for a, b in bank.spec.exchanges[0].product_shapes)
        found[num_rows] = {
            "seconds": seconds,
            "bytes_per_s": num_bytes / seconds,
            "flops": operations / seconds,
        }
    return found


def _bank(place: Place, form: WeightFormat | None) -> ExpertBank:
    """Experts of a layer of OLMoE-1B-7B."""
    model = TINY if place.is_tiny else OLMOE
    width, device = model.hidden, place.device
    exchange = ExchangeSpec(
        index=0,
        name="mlp",
        in_width=width,
        out_width=width,
        expert_width=model.ffn,
        form=form,
    )
    spec = BankSpec(
        index=0,
        bank="mlp",
        layer=0,
        num_experts=model.experts,
        top_k=model.top_k,
        exchanges=(exchange,),
    )
    bank = ExpertBank(spec, model.experts, _DTYPE, device)
    generator = torch.Generator(device).manual_seed(0)
    for slot, (exchange_index, matrix, shape) in itertools.product(
        range(model.experts), spec.matrices
    ):
        weight = (
            torch.randn(shape, device=device, generator=generator).div(shape[1] ** 0.5).to(_DTYPE)
            if form is None
            else draw_matrix(form, shape, generator)
        )
        synchronize(device)  # the bank reads it on a stream of its own
        bank.store(slot, exchange_index, matrix, weight)
    return bank


def _turns(place: Place, bank: ExpertBank, num_rows: int) -> tuple[Callable[[], Tensor], float]:
    """Return a call that multiplies different rows in each turn, and the bytes of a turn."""
    spec, device = bank.spec, place.device
    generator = torch.Generator(device).manual_seed(num_rows)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, device=device, generator=generator)

    cases = [
        (
            drawn(num_rows, spec.exchanges[0].in_width).sub(0.5).to(_DTYPE),
            drawn(num_rows, spec.num_experts).topk(spec.top_k, dim=1).indices,
            drawn(num_rows, spec.top_k),
        )
        for _ in range(place.size(_TURNS, 1))
    ]
    used = sum(len(set(slots.flatten().tolist())) for _, slots, _ in cases) / len(cases)

    def call() -> Tensor:
        return [bank.compute_rows(0, *case, _DTYPE) for case in cases][-1]

    return call, used * spec.num_bytes(_DTYPE.itemsize)


def _steps(place: Place, form: WeightFormat | None, rates: _Rates) -> dict[int, dict[str, float]]:
    """Measure decode steps of a model by batch size."""
    model = TINY if place.is_tiny else OLMOE
    batches = _BATCHES[: place.size(len(_BATCHES), 1)]
    context = place.size(256, 24)
    engine = make_engine(place, model, context, max(batches), form)
    given = Run(
        place=place,
        model=model,
        engine=engine,
        context=context,
        read_rate=rates.read,
        matrix_rate=1.0,
    )
    found = {batch: _decode(given, batch, form) for batch in batches}
    del given, engine
    gc.collect()  # an engine and its graphs refer to each other
    if place.is_gpu:
        torch.cuda.empty_cache()
    return found


def _decode(given: Run, batch: int, form: WeightFormat | None) -> dict[str, float]:
    """Measure steps in which all sequences of a batch decode."""
    place, engine = given.place, given.engine
    names, _ = fill(given, batch, given.context)
    steps(engine, place.size(6, 1))
    step_s = median_step_s(engine, place.size(60, 2))
    busy_s = cost_of_steps(engine, place.device, place.size(4, 1))["busy_s"]
    for name in names:
        engine.engine.abort(name)
    read = step_weight_bytes(given.model, batch, _DTYPE.itemsize, form)
    read += given.kv_bytes(batch, given.context)
    return {
        "step_s": step_s,
        "busy_s": busy_s,
        "tokens_per_s": batch / step_s,
        "bytes": read,
        "share_of_bound": read / given.read_rate / step_s,
    }
