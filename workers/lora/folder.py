"""LoRA adapter folders in PEFT's format: ``adapter_config.json`` and safetensors.

The header of the safetensors file is checked against the model before any data is read, and only
the data that the header describes is read.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec
import torch
from safetensors import SafetensorError, deserialize
from torch import Tensor

from cluster.core.codec import Count, Message
from cluster.core.errors import CheckpointError
from workers.lora.catalog import LoraTarget, refusal_reason
from workers.lora.settings import AdapterSettings, read_settings

WEIGHTS_FILE = "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_TEXT, _WHOLE = "model.", "model.language_model."
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ModuleMatrices:
    """Matrices of a LoRA adapter for one module: the delta is ``scale * up @ (down @ x)``."""

    target: LoraTarget
    down: Tensor
    """Matrix A: [rank, in], in the dtype of the file."""
    up: Tensor
    """Matrix B: [out, rank], in the dtype of the file."""
    scale: float


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """Contents of a validated LoRA adapter folder, in CPU memory."""

    modules: tuple[ModuleMatrices, ...]
    digest: str
    """Hash of the folder's config file and safetensors file: 32 hex digits."""


class _Entry(Message, frozen=True, kw_only=True):
    """One tensor in the header of a safetensors file."""

    dtype: str
    shape: tuple[Count, ...]
    data_offsets: tuple[int, int]
    """Offsets of the first byte of the data and of the byte after the last one. The safetensors
    library checks them."""


_HEADER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ENTRY = msgspec.json.Decoder(_Entry)
_METADATA = "__metadata__"


def read_folder(path: Path, targets: Mapping[str, LoraTarget], max_rank: int) -> AdapterFolder:
    """Check and read an adapter folder. Raises ``CheckpointError``, which states the fault.

    ``targets``: modules that adapters may change, by name; see ``catalog.targets_of``.
    ``max_rank``: maximum rank of a module.
    """
    try:
        is_folder = path.is_dir()
    except OSError as err:
        raise CheckpointError(f"{path} cannot be read: {err.strerror}") from err
    if not is_folder:
        raise CheckpointError(f"{path}: no such folder")
    settings, config = read_settings(path)
    file = path / WEIGHTS_FILE
    try:
        if not file.is_file():
            raise CheckpointError(f"{path.name}: there is no {WEIGHTS_FILE} in the folder")
        with file.open("rb") as opened:
            header, entries = _read_header(opened)
            found = _checked(entries, settings, targets, max_rank)
            num_bytes = sum(_num_bytes(entry) for entry in entries.values())
            data = header + opened.read(num_bytes + 1)  # at once, as the file may be replaced later
        stored = {name: tensor["data"] for name, tensor in deserialize(data)}  # type: ignore[no-untyped-call]
    except SafetensorError as err:
        raise _damaged(str(err)) from err
    except OSError as err:
        raise CheckpointError(f"{WEIGHTS_FILE} cannot be read: {err.strerror}") from err

    def tensor(name: str) -> Tensor:
        entry = entries[name]
        kind = _DTYPES[entry.dtype]
        return torch.frombuffer(bytearray(stored[name]), dtype=kind).view(entry.shape)

    modules = tuple(
        ModuleMatrices(target, tensor(names["A"]), tensor(names["B"]), settings.scale_of(module))
        for module, (target, names) in found.items()
    )
    for matrices in modules:
        _check_finite(matrices)
    digest = hashlib.blake2b(config, digest_size=16)
    digest.update(data)
    return AdapterFolder(modules, digest.hexdigest())


def _read_header(opened: BinaryIO) -> tuple[bytes, dict[str, _Entry]]:
    """Return the bytes of a safetensors header, including its length field, and the tensors by
    name."""
    length = opened.read(_LENGTH_BYTES)
    num_bytes = int.from_bytes(length, "little")
    if len(length) < _LENGTH_BYTES or num_bytes > _MAX_HEADER_BYTES:
        raise _damaged(f"its header has {num_bytes} bytes, the limit is {_MAX_HEADER_BYTES}")
    text = opened.read(num_bytes)
    try:
        known = _HEADER.decode(text)
        entries = {name: _ENTRY.decode(raw) for name, raw in known.items() if name != _METADATA}
    except (msgspec.MsgspecError, ValueError, RecursionError) as err:
        raise _damaged(str(err)) from err
    return length + text, entries


def _num_bytes(entry: _Entry) -> int:
    return _DTYPES[entry.dtype].itemsize * math.prod(entry.shape)


def _damaged(reason: str) -> CheckpointError:
    return CheckpointError(
        f"{WEIGHTS_FILE} is truncated, damaged, or not a safetensors file: {reason}"
    )


def _checked(
    entries: Mapping[str, _Entry],
    settings: AdapterSettings,
    targets: Mapping[str, LoraTarget],
    max_rank: int,
) -> dict[str, tuple[LoraTarget, dict[str, str]]]:
    """Check an adapter's tensors; return target and tensor names by the adapter's module name, in
    the order of the model.

    The tensor names of a module are by side, ``A`` and ``B``. Raises ``CheckpointError``.
    """
    by_module: dict[str, dict[str, str]] = {}
    for name, found in entries.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"tensor {name} is not supported: it must be lora_A.weight or lora_B.weight of a "
                f"module, and {_reason(name, targets)}"
            )
        if found.dtype not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise CheckpointError(f"tensor {name} has dtype {found.dtype}, supported are {known}")
        by_module.setdefault(match["module"], {})[match["side"]] = name
    if not by_module:
        raise CheckpointError(f"{WEIGHTS_FILE} has no tensors")
    found_targets: dict[str, tuple[LoraTarget, dict[str, str]]] = {}
    places = {id(target): place for place, target in enumerate(targets.values())}
    for module, names in by_module.items():
        target = _target(module, targets)
        if target is None:
            raise CheckpointError(
                f"tensor {next(iter(names.values()))}: {module} {refusal_reason(module)}"
            )
        if not settings.has_target(module):
            raise CheckpointError(f"{module} has tensors, but is not among target_modules")
        if missing := {"A", "B"} - names.keys():
            raise CheckpointError(f"{module} has no tensor lora_{missing.pop()}.weight")
        _check_shapes(module, names, entries, settings, target, max_rank)
        found_targets[module] = target, names
    if len({id(target) for target, _ in found_targets.values()}) < len(found_targets):
        raise CheckpointError(f"{WEIGHTS_FILE} names a module twice, with {_WHOLE} and without")
    return dict(sorted(found_targets.items(), key=lambda item: places[id(item[1][0])]))


def _target(module: str, targets: Mapping[str, LoraTarget]) -> LoraTarget | None:
    """Return the target of a module name, or None. The adapter may be made for the text model or
    for a text and image model that contains the text model."""
    names = [module]
    if module.startswith(_WHOLE):
        names.append(module.replace(_WHOLE, _TEXT, 1))
    elif module.startswith(_TEXT):
        names.append(module.replace(_TEXT, _WHOLE, 1))
    return next((targets[name] for name in names if name in targets), None)


def _reason(name: str, targets: Mapping[str, LoraTarget]) -> str:
    """Return why a tensor that is neither ``lora_A`` nor ``lora_B`` of a module is refused."""
    module = name.removeprefix("base_model.model.")
    module = re.sub(r"\.(lora_\w+|base_layer|modules_to_save)\b.*|\.(weight|bias)$", "", module)
    is_target = _target(module, targets) is not None
    return f"{module} {'is changed in an unsupported way' if is_target else refusal_reason(module)}"


def _check_shapes(
    module: str,
    names: Mapping[str, str],
    entries: Mapping[str, _Entry],
    settings: AdapterSettings,
    target: LoraTarget,
    max_rank: int,
) -> None:
    rank = settings.rank_of(module)
    if rank > max_rank:
        raise CheckpointError(f"{module}: rank {rank} must not exceed max_lora_rank ({max_rank})")
    out, width = target.part.shape
    for side, expected in (("A", (rank, width)), ("B", (out, rank))):
        shape = entries[names[side]].shape
        if shape != expected:
            raise CheckpointError(
                f"tensor {names[side]} has shape {list(shape)}, the model and rank {rank} require "
                f"{list(expected)}"
            )


def _check_finite(matrices: ModuleMatrices) -> None:
    for tensor in (matrices.down, matrices.up):
        if not torch.isfinite(tensor).all():
            name = matrices.target.part.name.removesuffix(".weight")
            raise CheckpointError(f"{name} has numbers that are not finite in the adapter")
