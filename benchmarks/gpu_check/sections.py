"""All sections in the order in which they run: the fastest checks first."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from benchmarks.gpu_check.section import Section

_HERE = "benchmarks.gpu_check"


def _operators(name: str, what: str, seconds: float = 30.0) -> Section:
    return Section(
        name=f"operators-{name}",
        what=what,
        function=f"{_HERE}.operators_{name}:run",
        seconds=seconds,
        least_s=10.0,
        is_correctness=True,
        needs_gpu=False,
    )


def _codes(bits: Literal[8, 4], function: str) -> Section:
    return replace(
        _operators(f"codes{bits}", f"sums over experts in {bits} bits, against a CPU", 45.0),
        function=f"{_HERE}.operators_codes:{function}",
    )


def _engine(name: str, seconds: float = 30.0, function: str = "") -> Section:
    return Section(
        name=f"engine-{name}",
        what=f"tokens and log-probabilities of {name}, against a CPU",
        function=f"{_HERE}.{function or f'engines:{name}'}",
        seconds=seconds,
        least_s=15.0,
        is_correctness=True,
        needs_gpu=False,
    )


SECTIONS = (
    Section(
        name="facts",
        what="versions, the device, and whether torch has what we call",
        function=f"{_HERE}.facts:run",
        seconds=30.0,
        least_s=5.0,
        is_correctness=True,
        needs_gpu=False,
    ),
    Section(
        name="ceilings",
        what="what the device can do at most",
        function=f"{_HERE}.ceilings:run",
        seconds=25.0,
        least_s=10.0,
        needs_gpu=False,
    ),
    _operators("attention", "attention over the paged cache, against a CPU", 50.0),
    _operators("experts", "sums over experts, against a CPU", 50.0),
    _codes(8, "eight_bits"),
    _codes(4, "four_bits"),
    _operators("layers", "norms, rotations and routers, against a CPU"),
    _operators("sampling", "draws, against a CPU"),
    _engine("olmoe"),
    _engine("dots1"),
    _engine("jetmoe"),
    _engine("demo"),
    _engine("others", 50.0),
    _engine("latent"),
    _engine("hybrid"),
    _engine("codes", 45.0, "engines_codes:run"),
    _engine("drafts", 45.0, "engines_drafts:run"),
    _engine("adapters", 30.0, "engines_adapters:run"),
    Section(
        name="sockets",
        what="1 + 1 workers over sockets: equal to one process, and one is killed",
        function=f"{_HERE}.workers:sockets",
        seconds=40.0,
        least_s=20.0,
        is_correctness=True,
        needs_gpu=False,
    ),
    Section(
        name="collective",
        what="1 + 1 workers over NCCL on one GPU: the same, and the survivor lives on for 90 s",
        function=f"{_HERE}.workers:collective",
        seconds=170.0,
        least_s=45.0,
        is_correctness=True,
        needs_gpu=False,
    ),
    Section(
        name="kills",
        what="1 + 1 workers over NCCL on one GPU: 20 times one is killed and replaced",
        function=f"{_HERE}.kills:run",
        seconds=400.0,
        least_s=45.0,
        is_correctness=True,
        needs_gpu=False,
        only_by_name=True,
    ),
    Section(
        name="speed",
        what="OLMoE-1B-7B with random weights, beside what the device allows and transformers",
        function=f"{_HERE}.speed:run",
        seconds=150.0,
        least_s=40.0,
        needs_gpu=False,
    ),
    Section(
        name="prompts",
        what="prefill by the tokens of a step, and decode while prompts arrive",
        function=f"{_HERE}.speed_prompts:run",
        seconds=60.0,
        least_s=30.0,
        needs_gpu=False,
        only_by_name=True,
    ),
    Section(
        name="qwen3",
        what="half of Qwen3-30B-A3B with random weights, beside what the device allows",
        function=f"{_HERE}.speed:qwen3",
        seconds=100.0,
        least_s=40.0,
        needs_gpu=False,
        only_by_name=True,
    ),
    Section(
        name="peer",
        what="transformers with a static cache, torch.compile and CUDA graphs: decode of OLMoE",
        function=f"{_HERE}.peer:run",
        seconds=200.0,
        least_s=60.0,
        needs_gpu=False,
        only_by_name=True,
    ),
    Section(
        name="speed-codes",
        what="the same model with experts in codes, beside bfloat16 and what the device allows",
        function=f"{_HERE}.speed_codes:run",
        seconds=120.0,
        least_s=40.0,
        needs_gpu=False,
    ),
    Section(
        name="candidates",
        what="kernels for experts and attention side by side",
        function=f"{_HERE}.candidates:run",
        seconds=50.0,
        least_s=20.0,
        needs_gpu=False,
    ),
)
