"""The row of the GPU check that compares the roofline's predictions with measured steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.checkpoints.random_checkpoint import TINY, RandomModel
from benchmarks.gpu_check.predicted import compare, device_spec, model_size, summary
from benchmarks.gpu_check.speed import OLMOE
from cluster.launch.checkpoint_check import check
from cluster.sizing.devices import CPU_CORE
from cluster.sizing.gpus import H100
from cluster.sizing.roofline import ModelSize

MEASURED_S = {1: 1 / 528, 64: 64 / 6602, 256: 256 / 12833}
"""Steps of one process on an H100 at context 1,024, by batch (docs/results/gpu.md)."""


def size_of_config(model: RandomModel, folder: Path) -> ModelSize:
    """The size that ``plan size`` computes from ``config.json``."""
    (folder / "config.json").write_text(json.dumps(model.config()))
    return check(folder, allow_bare=True).size("bfloat16", None)


@pytest.mark.parametrize("model", [OLMOE, TINY, replace(TINY, family="qwen3_moe")])
def test_a_model_has_the_size_that_plan_size_computes(model: RandomModel, tmp_path: Path) -> None:
    assert model_size(model, torch.bfloat16) == size_of_config(model, tmp_path)


def test_an_h100_meets_the_goal() -> None:
    found = compare(model_size(OLMOE, torch.bfloat16), H100, 1024, MEASURED_S)
    assert list(found) == ["batch 1", "batch 64", "batch 256"]
    assert all(one["is_in_goal"] for one in found.values())
    for one in found.values():
        assert one["predicted_s"] > one["predicted_host_s"] > 0.4e-3
        ratio = one["predicted_s"] / one["measured_s"]
        assert one["predicted_by_measured"] == pytest.approx(ratio)


def test_a_step_that_differs_by_more_misses_the_goal() -> None:
    size = model_size(OLMOE, torch.bfloat16)
    predicted_s = compare(size, H100, 1024, {64: 1.0})["batch 64"]["predicted_s"]
    for factor, is_in_goal in ((0.84, False), (0.86, True), (1.14, True), (1.16, False)):
        found = compare(size, H100, 1024, {64: predicted_s / factor})
        assert found["batch 64"]["is_in_goal"] is is_in_goal
    assert summary(found) == "predicted / measured step 1.16 (batch 64)"


def test_a_cpu_has_the_numbers_of_a_core() -> None:
    assert device_spec(torch.device("cpu")) == CPU_CORE
