"""Adapters in folders, as PEFT writes them: ``adapter_config.json`` and safetensors.

The header of the file is checked against the model before any number is read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cluster.core.errors import CheckpointError
from workers.lora.catalog import Target, why_not
from workers.lora.settings import AdapterSettings, read_settings

WEIGHTS_FILE = "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_DTYPES = ("F32", "BF16", "F16")
_MAX_SPARE_BYTES = 16 * 1024 * 1024
"""Header of a file, and room between its tensors."""
_PIECE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ModuleMatrices:
    """What an adapter adds to a module: ``scale * up @ (down @ x)``."""

    target: Target
    down: Tensor
    """A: [rank, in], as stored."""
    up: Tensor
    """B: [out, rank], as stored."""
    scale: float


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """A checked adapter, in memory on the CPU."""

    modules: tuple[ModuleMatrices, ...]
    rank: int
    """The largest."""
    digest: str
    """Hash of both files: 32 hex digits."""


def read_folder(path: Path, targets: Mapping[str, Target], max_rank: int) -> AdapterFolder:
    """Check and read a folder. Raises ``CheckpointError`` naming what is wrong.

    ``targets`` by module; see ``catalog.targets_of``.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    settings, config = read_settings(path)
    file = path / WEIGHTS_FILE
    if not file.is_file():
        raise CheckpointError(f"{path.name}: there is no {WEIGHTS_FILE} in the folder")
    try:
        with safe_open(file, framework="pt") as reader:
            shapes = dict(_shapes(reader))
            found = _checked(shapes, settings, targets, max_rank)
            num_bytes = file.stat().st_size
            _check_size(num_bytes, shapes)
            digest = _digest(config, file)
            modules = tuple(
                ModuleMatrices(
                    target,
                    reader.get_tensor(names["A"]).clone(),
                    reader.get_tensor(names["B"]).clone(),
                    settings.scale_of(module),
                )
                for module, (target, names) in found.items()
            )
    except SafetensorError as err:
        raise CheckpointError(
            f"{WEIGHTS_FILE} is truncated, damaged, or not a safetensors file: {err}"
        ) from err
    except OSError as err:
        raise CheckpointError(f"{WEIGHTS_FILE} cannot be read: {err.strerror}") from err
    for matrices in modules:
        _check_finite(matrices)
    return AdapterFolder(modules, max(len(m.down) for m in modules), digest)


@dataclass(frozen=True, slots=True)
class _Shape:
    dtype: str
    shape: tuple[int, ...]


def _shapes(reader: Any) -> Iterator[tuple[str, _Shape]]:
    for name in reader.keys():  # noqa: SIM118
        part = reader.get_slice(name)
        yield name, _Shape(part.get_dtype(), tuple(part.get_shape()))


def _checked(
    shapes: Mapping[str, _Shape],
    settings: AdapterSettings,
    targets: Mapping[str, Target],
    max_rank: int,
) -> dict[str, tuple[Target, dict[str, str]]]:
    """By module in the order of the model, the names of its two tensors."""
    by_module: dict[str, dict[str, str]] = {}
    for name, found in shapes.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"tensor {name} is not supported: it must be lora_A.weight or lora_B.weight of a "
                f"module, and {_reason(name)}"
            )
        if found.dtype not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise CheckpointError(f"tensor {name} has dtype {found.dtype}, supported are {known}")
        by_module.setdefault(match["module"], {})[match["side"]] = name
    if not by_module:
        raise CheckpointError(f"{WEIGHTS_FILE} has no tensors")
    for module, names in by_module.items():
        if module not in targets:
            raise CheckpointError(
                f"tensor {next(iter(names.values()))}: {module} {why_not(module)}"
            )
        if not settings.has_target(module):
            raise CheckpointError(f"{module} has tensors, and is not among target_modules")
        if missing := {"A", "B"} - names.keys():
            raise CheckpointError(f"{module} has no tensor lora_{missing.pop()}.weight")
        _check_shapes(module, names, shapes, settings, targets[module], max_rank)
    return {m: (target, by_module[m]) for m, target in targets.items() if m in by_module}


def _reason(name: str) -> str:
    """What is said of a tensor of another kind."""
    module = name.removeprefix("base_model.model.")
    module = re.sub(r"\.(lora_\w+|base_layer|modules_to_save)\b.*|\.(weight|bias)$", "", module)
    return (
        f"{module} {why_not(module)}"
        if not module.startswith("model.layers")
        else (f"{module} is changed in another way")
    )


def _check_shapes(
    module: str,
    names: Mapping[str, str],
    shapes: Mapping[str, _Shape],
    settings: AdapterSettings,
    target: Target,
    max_rank: int,
) -> None:
    rank = settings.rank_of(module)
    if rank > max_rank:
        raise CheckpointError(f"{module}: rank {rank} must not exceed max_lora_rank ({max_rank})")
    out, width = target.part.shape
    for side, expected in (("A", (rank, width)), ("B", (out, rank))):
        shape = shapes[names[side]].shape
        if shape != expected:
            raise CheckpointError(
                f"tensor {names[side]} has shape {list(shape)}, the model and rank {rank} ask for "
                f"{list(expected)}"
            )


def _check_size(num_bytes: int, shapes: Mapping[str, _Shape]) -> None:
    """A file is hashed whole: what it has beside the tensors is bounded."""
    widths = {"F32": 4, "BF16": 2, "F16": 2}
    needed = sum(widths[s.dtype] * torch.Size(s.shape).numel() for s in shapes.values())
    if num_bytes > needed + _MAX_SPARE_BYTES:
        raise CheckpointError(f"{WEIGHTS_FILE} has {num_bytes} bytes, its tensors have {needed}")


def _digest(config: bytes, file: Path) -> str:
    digest = hashlib.blake2b(config, digest_size=16)
    with file.open("rb") as data:
        while piece := data.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _check_finite(matrices: ModuleMatrices) -> None:
    for tensor in (matrices.down, matrices.up):
        if not torch.isfinite(tensor).all():
            name = matrices.target.part.name.removesuffix(".weight")
            raise CheckpointError(f"{name} has numbers in the adapter that are not finite")
