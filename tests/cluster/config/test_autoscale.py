from __future__ import annotations

from typing import Any

import pytest

from cluster.config.autoscale import AutoscaleSection, PoolLimits
from cluster.config.cluster import ClusterConfig
from cluster.config.model import ModelSection
from cluster.config.workers import WorkersSection
from cluster.core.errors import ConfigError

MODEL = ModelSection(path="somewhere", served_model_name="m")
ON: dict[str, Any] = {"autoscale": "on"}


def config_of(autoscale: dict[str, Any], **workers: Any) -> ClusterConfig:
    return ClusterConfig(
        model=MODEL,
        workers=WorkersSection(**workers),
        autoscale=AutoscaleSection(**autoscale),
    )


def test_it_is_off_by_default_and_limits_may_wait_there() -> None:
    assert config_of({}).autoscale.autoscale == "off"
    assert config_of({"max_expert_workers": 1}, num_expert_workers=4).autoscale.autoscale == "off"


def test_a_pool_without_limits_keeps_its_size() -> None:
    section = config_of({**ON, "max_attention_workers": 4}, num_attention_workers=2).autoscale
    assert section.limits({"attention": 2, "expert": 3}) == {
        "attention": PoolLimits(min_workers=2, max_workers=4),
        "expert": PoolLimits(min_workers=3, max_workers=3),
    }
    assert PoolLimits(min_workers=2, max_workers=4).clamp(9) == 4
    assert PoolLimits(min_workers=2, max_workers=4).clamp(1) == 2


def test_colocated_workers_have_the_limits_of_expert_workers() -> None:
    section = config_of({**ON, "max_expert_workers": 4}, mode="colocated").autoscale
    assert section.limits({"colocated": 2}) == {
        "colocated": PoolLimits(min_workers=2, max_workers=4)
    }


def test_auto_is_checked_once_the_mode_is_chosen() -> None:
    config_of(ON, mode="auto")
    with pytest.raises(ConfigError, match="needs a limit that differs"):
        config_of(ON, mode="colocated")


@pytest.mark.parametrize(
    ("autoscale", "workers", "text"),
    [
        ({"autoscale": "maybe"}, {}, r"autoscale (maybe) must be one of off, dry-run, on"),
        ({"min_expert_workers": 0}, {}, r"min_expert_workers (0) must be at least 1"),
        ({"kv_target": 1.5}, {}, r"autoscale_kv_target (1.5) must be above 0 and at most 1"),
        ({"queue_target": 0.0}, {}, r"autoscale_queue_target (0.0) must be positive"),
        ({"down_s": 10.0}, {}, r"autoscale_down_s (10.0) must be at least autoscale_up_s (30)"),
        (
            {**ON, "max_expert_workers": 4},
            {"mode": "local"},
            r"autoscale (on) must be off in local mode: one worker holds everything",
        ),
        (
            {"autoscale": "dry-run", "max_attention_workers": 4},
            {"mode": "colocated"},
            r"max_attention_workers (4) must be left out in colocated mode",
        ),
        (
            {**ON, "max_attention_workers": 1},
            {"num_attention_workers": 2},
            r"max_attention_workers (1) must be at least num_attention_workers (2)",
        ),
        (
            {**ON, "min_expert_workers": 3},
            {"num_expert_workers": 2},
            r"min_expert_workers (3) must not exceed num_expert_workers (2)",
        ),
        (
            {**ON, "max_expert_workers": 4},
            {"follow_nodes": True},
            r"autoscale (on) must be off or dry-run with follow_nodes",
        ),
        (ON, {}, r"autoscale (on) needs a limit that differs from the number at start"),
    ],
)
def test_broken_rules_name_field_value_and_rule(
    autoscale: dict[str, Any], workers: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(autoscale, **workers)
    assert text in str(caught.value)
