"""Random models in the shapes of public checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoints.random_checkpoint import RandomModel

MODELS = Path(__file__).parents[1] / "models"
"""``NAME/config.json`` of public checkpoints: their shapes, no weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublicShape(RandomModel):
    """Random weights in the shape of a public checkpoint; see ``public_shape``."""

    folder: str
    """Folder of its ``config.json`` in ``MODELS``."""

    def config(self) -> dict[str, object]:
        return _read(self.folder) | {"num_hidden_layers": self.layers, "eos_token_id": None}


def public_shape(folder: str, layers: int | None = None) -> PublicShape:
    """Return the shape of a public checkpoint of OLMoE or Qwen3-MoE, with ``layers`` if given."""
    config = _read(folder)
    return PublicShape(
        folder=folder,
        family=config["model_type"],
        hidden=config["hidden_size"],
        layers=layers or config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        experts=config["num_experts"],
        top_k=config["num_experts_per_tok"],
        ffn=config.get("moe_intermediate_size", config["intermediate_size"]),
        vocab=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
    )


def _read(folder: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((MODELS / folder / "config.json").read_text())
    return config
