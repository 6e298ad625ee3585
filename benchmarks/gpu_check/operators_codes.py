"""Sums over experts in codes on the device, against plain experts of the same numbers on a CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.checkpoints.random_codes import draw_matrix
from benchmarks.gpu_check.code_formats import EIGHT_BITS, FOUR_BITS, MAIN
from benchmarks.gpu_check.compare import Worst
from benchmarks.gpu_check.device import captured
from benchmarks.gpu_check.operators_experts import CPU, outputs, plain_kernel, routes
from benchmarks.gpu_check.section import Place, Report
from workers.experts.bank import ExpertBank, make_kernel
from workers.model.compute_threads import ComputeThreads
from workers.model.config import BankSpec, ClampedSwiglu, ExchangeSpec
from workers.quantization.formats import WeightFormat
from workers.quantization.matrix import QuantizedMatrix, Weight

_ROWS = (1, 2, 33, 200, 4096)
"""Blocks of each height."""
_FEW_ROWS = (1, 4, 200)
_GRAPH_ROWS = 9


def specs(place: Place) -> dict[str, BankSpec]:
    """Banks of each kind, still without codes."""
    width, inner = place.size(512, 48), place.size(384, 40)
    gated = ExchangeSpec(index=0, name="mlp", in_width=width, out_width=width, expert_width=inner)
    clamped = replace(gated, activation=ClampedSwiglu(1.702, 7.0), has_bias=True)
    linear = ExchangeSpec(
        index=0, name="query", in_width=width, out_width=inner, expert_kind="linear", weighted=False
    )
    bank = BankSpec(index=0, bank="mlp", layer=0, num_experts=16, top_k=4, exchanges=(gated,))
    return {
        "silu": bank,
        "clamped": replace(bank, exchanges=(clamped,)),
        "linear": replace(bank, exchanges=(linear,)),
    }


def eight_bits(place: Place, report: Report) -> None:
    """int8 and float8."""
    _run(place, report, EIGHT_BITS)


def four_bits(place: Place, report: Report) -> None:
    """int4 and MXFP4."""
    _run(place, report, FOUR_BITS)


def _run(place: Place, report: Report, forms: Mapping[str, WeightFormat]) -> None:
    """Each format with gated experts in bfloat16; the main ones with other experts, in float32, and
    replayed from a CUDA graph, too."""
    worst, kinds = Worst(), specs(place)
    for name, form in forms.items():
        _compare(place, report, name, _coded(kinds["silu"], form), torch.bfloat16, _ROWS, worst)
        if name not in MAIN:
            continue
        _compare(place, report, name, _coded(kinds["silu"], form), torch.float32, _FEW_ROWS, worst)
        for kind in ("clamped", "linear"):
            spec = _coded(kinds[kind], form)
            _compare(place, report, f"{name} {kind}", spec, torch.bfloat16, _FEW_ROWS, worst)
        if place.is_gpu:
            with report.part(f"{name} from a graph"):
                _check_graph(place, report, name, _coded(kinds["silu"], form))
    report.value("largest differences", worst.found)
    report.say(worst.words)


def _coded(spec: BankSpec, form: WeightFormat) -> BankSpec:
    return replace(spec, exchanges=tuple(replace(e, form=form) for e in spec.exchanges))


def _compare(
    place: Place,
    report: Report,
    name: str,
    spec: BankSpec,
    dtype: torch.dtype,
    rows: Sequence[int],
    worst: Worst,
) -> None:
    with report.part(f"{name} {dtype}"):
        ours, known = coded_banks(spec, dtype, place.device)
        for num_rows in rows:
            slots, weights = routes(spec, min(num_rows, place.size(4096, 40)), num_rows == 33)
            got = outputs(ours, slots.to(place.device), weights.to(place.device), dtype)
            want = outputs(known, slots, weights, dtype)
            worst.compare(report, f"{name}, {num_rows} rows", got, want)


def coded_banks(
    spec: BankSpec, dtype: torch.dtype, device: torch.device
) -> tuple[ExpertBank, ExpertBank]:
    """Experts in codes on the device, and experts with their numbers in a type on a CPU."""
    plain = replace(spec, exchanges=tuple(replace(e, form=None) for e in spec.exchanges))
    ours = ExpertBank(spec, spec.num_experts, dtype, device, make_kernel)
    # Padded products: they take biases, and share no code with ours.
    make_plain = partial(plain_kernel, threads=ComputeThreads())
    known = ExpertBank(plain, spec.num_experts, dtype, CPU, make_plain)
    generator = torch.Generator().manual_seed(1)
    for slot in range(spec.num_experts):
        for exchange, matrix, shape in spec.matrices:
            form = spec.exchanges[exchange].form_of(matrix)
            weight: Weight = (
                torch.randn(shape, generator=generator).to(dtype)
                if form is None
                else draw_matrix(form, shape, generator)
            )
            ours.store(slot, exchange, matrix, weight)
            numbers = weight.dequantized() if isinstance(weight, QuantizedMatrix) else weight
            known.store(slot, exchange, matrix, numbers.to(dtype))
    return ours, known


def _check_graph(place: Place, report: Report, name: str, spec: BankSpec) -> None:
    """A replay gives the bits of a launch, also for other rows than those that were captured."""
    ours, _ = coded_banks(spec, torch.bfloat16, place.device)
    slots, weights = (x.to(place.device) for x in routes(spec, _GRAPH_ROWS, False))
    x = torch.randn(_GRAPH_ROWS, spec.exchanges[0].in_width, device=place.device).bfloat16()

    def call() -> Tensor:
        return ours.compute_rows(0, x, slots, weights, torch.bfloat16)

    graph, found = captured(place.device, call)
    x.copy_(x.flip(0))
    slots.copy_(slots.roll(1, 0))
    graph.replay()
    want = call()
    report.check(torch.equal(found, want), f"{name}: a graph gives other bits")
