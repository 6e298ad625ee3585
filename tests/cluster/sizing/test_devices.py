"""What a step costs on a device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.config.cluster import ClusterConfig
from cluster.config.expert_load import RebalanceSection
from cluster.config.model import ModelSection
from cluster.config.workers import WorkersSection
from cluster.core.errors import ConfigError
from cluster.sizing.devices import expert_step_cost
from cluster.sizing.gpus import gpu_spec


def config_of(**workers: Any) -> ClusterConfig:
    model = ModelSection(path="x", served_model_name="x")
    return ClusterConfig(model=model, workers=WorkersSection(**workers))


@pytest.mark.parametrize(
    ("device", "dtype", "pairs"),
    [("cpu", "bfloat16", 9.1), ("cpu", "float32", 18.2), ("cuda", "bfloat16", 295.2)],
)
def test_a_slot_costs_by_the_roofline(device: str, dtype: str, pairs: float) -> None:
    found = expert_step_cost(config_of(device=device), 1 << 20, dtype)
    assert found.slot_s / found.token_s == pytest.approx(pairs, rel=0.01)
    assert found.expert_bytes == 1 << 20


def test_a_slot_costs_by_the_roofline_of_the_gpu() -> None:
    found = expert_step_cost(config_of(device="cuda"), 1 << 20, "bfloat16", gpu_spec("NVIDIA A100"))
    assert found.slot_s / found.token_s == pytest.approx(153.0, rel=0.01)


def test_a_slot_costs_the_pairs_that_are_configured() -> None:
    config = replace(config_of(), rebalance=RebalanceSection(slot_cost_pairs=4.0))
    found = expert_step_cost(config, 1 << 20, "float32")
    assert found.slot_s == pytest.approx(4.0 * found.token_s)
    assert found.token_s == expert_step_cost(config_of(), 1 << 20, "float32").token_s
    with pytest.raises(ConfigError, match=r"slot_cost_pairs \(-1\.0\) must not be negative"):
        RebalanceSection(slot_cost_pairs=-1.0)
