"""Safetensors files of a checkpoint folder, and the file of each tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cluster.core.errors import CheckpointError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
"""Endings of pickled checkpoint files, which are never opened."""
_ITEM_BYTES = {"F32": 4, "I32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "U8": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """Description of one tensor in the header of a safetensors file."""

    file: Path
    dtype: str
    """Dtype in safetensors spelling, ``BF16`` for example."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data; 0 for an unknown dtype."""
        return math.prod(self.shape) * _ITEM_BYTES.get(self.dtype, 0)


Headers = Mapping[Path, Mapping[str, TensorEntry]]
"""Headers of a checkpoint's files: all tensors by file and tensor name."""


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """Weight files of a checkpoint, and its index (``model.safetensors.index.json``)."""

    files: tuple[Path, ...]
    index: Mapping[str, Path]
    """File of each tensor, by tensor name; empty if the checkpoint has no index."""

    def choose(self, headers: Headers) -> tuple[dict[str, TensorEntry], dict[str, str]]:
        """Choose the file from which each tensor is read.

        This is the file that the index names. A tensor that is not in the index is read, as in
        transformers, if only one file has it. Returns the chosen tensors by name and, for tensors
        that cannot be read, the reason by name.
        """
        chosen, unclear = {}, {}
        for name, file in self.index.items():
            if name in headers[file]:
                chosen[name] = headers[file][name]
            else:
                unclear[name] = f": {_INDEX} says that it is in {file.name}"
        for header in headers.values():
            for name, entry in header.items():
                if name in self.index or name in unclear:
                    continue
                if name in chosen:
                    names = f"{chosen.pop(name).file.name} and {entry.file.name}"
                    unclear[name] = f": it is in {names}, and {_INDEX} does not say which to read"
                else:
                    chosen[name] = entry
        return chosen, unclear


def weight_files(path: Path) -> WeightFiles:
    """Return the weight files of a checkpoint folder. Raises ``CheckpointError`` if files are
    missing or the index is invalid."""
    index = path / _INDEX
    if not index.is_file():
        if not (path / _SINGLE).is_file():
            raise CheckpointError(f"{path.name}: {_why_no_weights(path)}")
        return WeightFiles((path / _SINGLE,), {})
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index.name} has no weight_map")
    by_tensor = {str(name): path / _inside(str(file)) for name, file in weight_map.items()}
    files = tuple(sorted(set(by_tensor.values())))
    for file in files:
        name = file.relative_to(path)
        try:
            is_there = file.is_file()
        except OSError as err:  # no permission, too long a name
            raise CheckpointError(f"{_INDEX} names {name}: {err.strerror}") from err
        if not is_there:
            raise CheckpointError(f"{_INDEX} names {name}, which is not in the folder")
    return WeightFiles(files, by_tensor)


def _inside(file: str) -> Path:
    """Return the path of a file that the index names, relative to the checkpoint folder. Raises
    ``CheckpointError`` for a path outside the folder."""
    found = Path(file)
    if found.is_absolute() or ".." in found.parts:
        raise CheckpointError(f"{_INDEX} names {file}, which is not in the folder")
    return found


def _why_no_weights(path: Path) -> str:
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in _PICKLES)
    if not pickles:
        return "there is no model.safetensors in the folder"
    rule = "is a pickle, which can run code when it is read, and is never opened"
    return f"{pickles[0]} {rule}: convert the checkpoint to safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises ``CheckpointError`` if the file is missing or has no
    JSON object."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError as err:
        raise CheckpointError(f"{path.parent.name}: there is no {path.name} in the folder") from err
    except (OSError, ValueError, RecursionError) as err:
        raise CheckpointError(f"{path.name} cannot be read: {err}") from err
    if not isinstance(data, dict):
        raise CheckpointError(f"{path.name} must hold a JSON object")
    return data


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Return the tensors of one safetensors file by name, from its header.

    Raises ``CheckpointError`` if the file is damaged or its size does not match the header.
    """
    try:
        with safe_open(file, framework="pt") as reader:
            return entries_of(reader, file)
    except (OSError, SafetensorError) as err:
        raise CheckpointError(
            f"{file.name} is truncated, damaged, or not a safetensors file: {err}"
        ) from err


def entries_of(reader: Any, file: Path) -> dict[str, TensorEntry]:
    """Return the tensors of an open safetensors file by name; ``file`` is its path."""
    slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118
    return {
        name: TensorEntry(file=file, dtype=part.get_dtype(), shape=tuple(part.get_shape()))
        for name, part in slices.items()
    }
