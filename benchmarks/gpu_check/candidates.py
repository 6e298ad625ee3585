"""Compares kernels for the same work: ours, torch's, and FlashInfer's if it is installed.

Another one is a line in ``EXPERTS``, ``DECODE`` or ``PREFILL``: a name, and a function that gets
ready before the measurement and returns the call that is measured.
"""

from __future__ import annotations

import torch

from benchmarks.gpu_check.candidates_attention import (
    DECODE,
    FLASHINFER,
    PREFILL,
    attention_case,
    has_flashinfer,
    prefill_case,
)
from benchmarks.gpu_check.candidates_experts import EXPERTS, expert_case
from benchmarks.gpu_check.candidates_measure import fastest, measure
from benchmarks.gpu_check.section import Place, Report

_EXPERT_ROWS = (1, 64, 256, 4096)
_DECODE_ROWS = (1, 64, 256)
_PROMPTS = ((1, 2000), (8, 2000))
"""Number of prompts, and tokens of each prompt."""


@torch.inference_mode()
def run(place: Place, report: Report) -> None:
    """Measure every candidate at every size."""
    best: list[str] = []
    _experts(place, report, best)
    _decode(place, report, best)
    _prefill(place, report, best)
    report.say("fastest " + ", ".join(best))
    _flashinfer(place, report)


def _experts(place: Place, report: Report, best: list[str]) -> None:
    for num_rows in _EXPERT_ROWS[: place.size(4, 2)]:
        name = f"experts, {num_rows} rows"
        with report.part(name):
            case = expert_case(place, num_rows)
            found = measure(place, EXPERTS, case, "bytes", case.num_bytes)
            report.value(name, found)
            best.append(f"{num_rows}: {fastest(found)}")


def _decode(place: Place, report: Report, best: list[str]) -> None:
    for num_rows in _DECODE_ROWS[: place.size(3, 2)]:
        name = f"attention, {num_rows} rows"
        with report.part(name):
            case = attention_case(place, num_rows)
            found = measure(place, DECODE, case, "bytes", case.num_bytes)
            report.value(name, found)
            best.append(f"{num_rows}: {fastest(found)}")


def _prefill(place: Place, report: Report, best: list[str]) -> None:
    for prompts, whole in _PROMPTS:
        tokens = place.size(whole, 24)
        name = f"attention, {prompts} x {tokens} tokens"
        with report.part(name):
            case = prefill_case(place, prompts, tokens)
            found = measure(place, PREFILL, case, "flops", case.flops)
            report.value(name, found)
            best.append(f"{prompts} x {tokens}: {fastest(found)}")


def _flashinfer(place: Place, report: Report) -> None:
    if not has_flashinfer():
        report.value("FlashInfer", "not installed")
        return
    for num_rows in _DECODE_ROWS[: place.size(3, 2)]:
        name = f"FlashInfer, {num_rows} rows"
        with report.part(name):
            case = attention_case(place, num_rows)
            report.value(name, measure(place, FLASHINFER, case, "bytes", case.num_bytes))
