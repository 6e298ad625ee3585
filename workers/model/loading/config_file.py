"""Reads ``config.json`` of a Hugging Face folder: the model's family and compute dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cluster.core.errors import CheckpointError, ConfigError
from workers.model.config import ModelConfig
from workers.model.families.base import Family
from workers.model.families.registry import load_family
from workers.model.loading.weight_files import read_json


def read_family(path: Path, has_predictor: bool) -> Family:
    """Return the model family of a checkpoint folder; reads no weights. ``has_predictor``: whether
    to include the multi-token prediction layer (MTP). Raises ``CheckpointError``."""
    family = load_family(read_config(path))
    return family.with_predictor() if has_predictor else family


def auto_dtype(config: ModelConfig) -> str:
    """Return the compute dtype for ``--dtype auto``: the checkpoint's dtype, but float32 in place
    of float16."""
    return "float32" if config.dtype == "float16" else config.dtype


def resolve_dtype(setting: str, config: ModelConfig) -> torch.dtype:
    """Return the compute dtype for ``setting``, the value of ``--dtype``. Raises ``ConfigError``
    for an unsupported dtype."""
    name = auto_dtype(config) if setting == "auto" else setting
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in known:
        raise ConfigError(
            "dtype", name, f"must be one of {', '.join(known)}: choose one explicitly"
        )
    return known[name]


def read_config(path: Path) -> dict[str, Any]:
    """Return ``config.json`` of a folder, with the end-of-sequence ids of
    ``generation_config.json`` added. Raises ``CheckpointError``."""
    if not path.is_dir():
        raise CheckpointError(f"{path.name}: no such folder")
    main, generation = path / "config.json", path / "generation_config.json"
    config = read_json(main)
    if generation.is_file():
        extra = _id_list(generation, read_json(generation).get("eos_token_id"))
        own = _id_list(main, config.get("eos_token_id"))
        config["eos_token_id"] = own + [token for token in extra if token not in own]
    return config


def _id_list(path: Path, value: Any) -> list[int]:
    """Return the ids of ``eos_token_id`` in the file ``path``. Raises ``CheckpointError``."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int for token in ids):
        raise CheckpointError(f"{path.name}: eos_token_id {value!r} must be a token id or a list")
    return ids
