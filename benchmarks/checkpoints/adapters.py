"""Adapters as PEFT writes them, with random matrices, and checkpoints with them merged."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from workers.lora.adapters import PreparedAdapter
from workers.lora.loaded import LoadedAdapters
from workers.model.families.base import Family
from workers.model.loading.checkpoint import Checkpoint

CONFIG: Mapping[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "somewhere/else",
    "bias": "none",
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 16,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.18.0",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}
"""What PEFT writes for ``LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])``."""
PREFIX = "base_model.model"
_NO_TARGETS = (
    "router",
    "norm",
    "gate.weight",
    "shared_expert_gate",
    "kv_b_proj",
    "sinks",
    "conv1d",
    "_bias",
)


@dataclass(frozen=True, kw_only=True)
class RandomAdapter:
    """An adapter to write, and to merge."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(dict(self.config)))
        save_file(dict(self.tensors), folder / "adapter_model.safetensors")
        return folder

    def delta(self, module: str) -> Tensor:
        """What it adds to a module's weight."""
        down = self.tensors[f"{PREFIX}.{module}.lora_A.weight"]
        up = self.tensors[f"{PREFIX}.{module}.lora_B.weight"]
        rank, alpha = len(down), self.config["lora_alpha"]
        for end, other in self.config["alpha_pattern"].items():
            alpha = other if module.endswith(end) else alpha
        scale = float(alpha / (math.sqrt(rank) if self.config["use_rslora"] else rank))
        return scale * up @ down

    @property
    def modules(self) -> list[str]:
        names = (name.removeprefix(f"{PREFIX}.") for name in self.tensors)
        return [name.removesuffix(".lora_A.weight") for name in names if ".lora_A." in name]


def random_adapter(
    shapes: Mapping[str, Sequence[int]], seed: int = 0, rank: int = 4, **config: Any
) -> RandomAdapter:
    """``shapes`` [out, in] by module. It changes each product by about as much as it is."""
    generator = torch.Generator().manual_seed(seed)
    tensors, settings = {}, {**CONFIG, "r": rank, "target_modules": "all-linear", **config}
    for module, (out, width) in shapes.items():
        ends = settings["rank_pattern"].items()
        own = next((r for end, r in ends if module.endswith(end)), rank)
        down = torch.randn(own, width, generator=generator) / math.sqrt(width)
        up = torch.randn(out, own, generator=generator) / settings["lora_alpha"]
        tensors[f"{PREFIX}.{module}.lora_A.weight"] = down
        tensors[f"{PREFIX}.{module}.lora_B.weight"] = up
    return RandomAdapter(config=settings, tensors=tensors)


def target_shapes(checkpoint: Path) -> dict[str, tuple[int, int]]:
    """[out, in] of all modules of a checkpoint that adapters may change, by name."""
    return target_shapes_of(Checkpoint(checkpoint).family)


def target_shapes_of(family: Family) -> dict[str, tuple[int, int]]:
    """The same of a model as workers know it."""
    parts = [
        part
        for layer in range(family.config.num_layers)
        for part in family.layer_parts(layer).values()
        if len(part.shape) == 2 and not any(mark in part.name for mark in _NO_TARGETS)
    ]
    return {p.name.removesuffix(".weight"): (p.shape[0], p.shape[1]) for p in parts}


def write_merged(checkpoint: Path, adapter: RandomAdapter, folder: Path) -> Path:
    """A copy of a checkpoint with an adapter in its weights, which are float32 then."""
    shutil.copytree(checkpoint, folder)
    left = set(adapter.modules)
    for file in checkpoint.glob("model*.safetensors"):
        tensors = load_file(file)
        for module in sorted(left):
            if (weight := tensors.get(f"{module}.weight")) is not None:
                tensors[f"{module}.weight"] = weight.float() + adapter.delta(module)
                left.remove(module)
        save_file(tensors, folder / file.name)
    assert not left, f"{left} are in no file"
    return folder


def put(adapters: LoadedAdapters, key: str, prepared: PreparedAdapter) -> None:
    """Make an adapter ready for rows, in one go."""
    for _ in adapters.build(key, prepared):
        pass
