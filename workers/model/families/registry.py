"""Finds a model's family by the ``model_type`` of its config."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from cluster.core.errors import CheckpointError
from workers.model.families.base import Family

FAMILIES = {
    "olmoe": "workers.model.families.grouped.olmoe",
    "dots1": "workers.model.families.grouped.dots1",
    "qwen3_moe": "workers.model.families.grouped.qwen3_moe",
    "flex_olmo": "workers.model.families.grouped.flex_olmo",
    "gpt_oss": "workers.model.families.grouped.gpt_oss",
    "glm4_moe": "workers.model.families.grouped.glm4_moe",
    "ernie4_5_moe": "workers.model.families.grouped.ernie4_5_moe",
    "minimax_m2": "workers.model.families.grouped.minimax_m2",
    "mixtral": "workers.model.families.grouped.mixtral",
    "deepseek_v2": "workers.model.families.latent.deepseek_v2",
    "deepseek_v3": "workers.model.families.latent.deepseek_v3",
    "kimi_k2": "workers.model.families.latent.deepseek_v3",
    "glm4_moe_lite": "workers.model.families.latent.glm4_moe_lite",
    "qwen3_next": "workers.model.families.hybrid.qwen3_next",
    "qwen3_5_moe": "workers.model.families.hybrid.qwen3_5_moe",
    "qwen3_5_moe_text": "workers.model.families.hybrid.qwen3_5_moe",
    "jetmoe": "workers.model.families.routed.jetmoe",
}
"""Module for each ``model_type``; its function ``family(config)`` returns a ``Family``."""


def load_family(config: Mapping[str, Any]) -> Family:
    """Return the family that a parsed ``config.json`` describes.

    Raises ``CheckpointError`` for an unsupported model type or setting.
    """
    model_type = config.get("model_type")
    module = FAMILIES.get(str(model_type))
    if module is None:
        supported = ", ".join(sorted(FAMILIES))
        raise CheckpointError(f"model_type {model_type!r} is not supported: it is not {supported}")
    family: Family = importlib.import_module(module).family(config)
    return family
