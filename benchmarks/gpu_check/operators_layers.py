"""Norms, rotations and routers on the device, against a CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.checkpoints.random_checkpoint import RandomModel
from benchmarks.gpu_check.compare import LIMITS, Worst
from benchmarks.gpu_check.section import Place, Report
from benchmarks.gpu_check.weights import RandomCheckpoint
from workers.model.building_blocks import BuildingBlocks
from workers.model.layers import rms_norm
from workers.model.loading.attention_model import load_attention_model
from workers.model.rope import Rope, rotate

CPU = torch.device("cpu")
_ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 64},
}
_LEAST_EQUAL = 0.97
"""Share of rows whose experts are the same; others choose between nearly equal ones."""


def run(place: Place, report: Report) -> None:
    """Each operator in each type."""
    worst = Worst()
    for dtype in LIMITS:
        with report.part(f"norms {dtype}"):
            _norms(place, report, dtype, worst)
        for name, scaling in _ROPES.items():
            with report.part(f"rotation {name} {dtype}"):
                _rotations(place, report, dtype, scaling, worst)
        for family in ("olmoe", "dots1", "jetmoe"):
            with report.part(f"router {family} {dtype}"):
                _router(place, report, family, dtype, worst)
    report.value("largest differences", worst.found)
    report.say(worst.words)


def _norms(place: Place, report: Report, dtype: torch.dtype, worst: Worst) -> None:
    generator = torch.Generator().manual_seed(1)
    for width in (place.size(2048, 24), place.size(128, 8)):
        x = torch.randn(place.size(300, 3), width, generator=generator).to(dtype)
        weight = torch.randn(width, generator=generator).to(dtype)
        want = rms_norm(x.clone(), weight, 1e-5)
        norm = rms_norm
        if place.is_gpu:
            from workers.cuda.norms import norm
        got = norm(x.to(place.device), weight.to(place.device), 1e-5)
        worst.compare(report, f"norm of {width}", got, want)


def _rotations(
    place: Place, report: Report, dtype: torch.dtype, scaling: dict[str, Any], worst: Worst
) -> None:
    model = RandomModel(hidden=64, layers=1, heads=2, max_positions=256)
    content = {**model.config(), "rope_scaling": scaling or None}
    config = RandomCheckpoint(content, CPU).config
    positions = torch.arange(0, 250, 7)
    lengths = positions + 3
    heads = torch.randn(len(positions), 2, config.head_dim).to(dtype)

    def rotated(device: torch.device) -> Tensor:
        rope: Rope = BuildingBlocks().rope(config.rope, 1024, dtype, device)
        waves = rope.rows(positions.to(device), lengths.to(device))
        return rotate(heads.to(device), *waves)

    what = f"rotation {config.rope.rope_type}"
    worst.compare(report, what, rotated(place.device), rotated(CPU))


def _router(place: Place, report: Report, family: Any, dtype: torch.dtype, worst: Worst) -> None:
    model = RandomModel(
        family=family, hidden=place.size(512, 64), layers=2, heads=8, experts=64, vocab=64
    )
    rows = torch.randn(place.size(500, 9), model.hidden).to(dtype)

    def routes(device: torch.device) -> tuple[Tensor, Tensor]:
        checkpoint = RandomCheckpoint(model, CPU)
        layer: Any = load_attention_model(checkpoint, dtype, device, 64).layers[-1]
        context = SimpleNamespace(attention=SimpleNamespace(recorder=None))
        hidden = rows.to(device)
        found = layer.half.leave(hidden, hidden / 2, context).routes
        return found.topk_ids.cpu(), found.topk_weights

    (ids, weights), (known_ids, known) = routes(place.device), routes(CPU)
    worst.compare(report, f"weights of {family}", weights, known)
    equal = (ids.sort(1).values == known_ids.sort(1).values).all(1).float().mean().item()
    report.value(f"equal choices of {family} {dtype}", equal)
    if dtype == torch.float32:
        report.check(equal >= _LEAST_EQUAL, f"{family}: only {equal:.1%} of rows choose the same")
