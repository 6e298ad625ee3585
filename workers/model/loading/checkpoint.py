"""Tensors of a Hugging Face folder by name and slice.

Files are mapped while weights are read and closed afterwards (``Checkpoint.close``), so that peak
memory of our own is what was loaded plus one tensor of a layer: the head comes first.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cluster.config.model import Quantize
from cluster.core.errors import CheckpointError, ConfigError
from workers.model.batch_invariant.invariant import RowInvariantBlocks
from workers.model.building_blocks import BuildingBlocks
from workers.model.compute_threads import ComputeThreads
from workers.model.config import BankSpec, ExpertMatrix, ModelConfig, TensorPart
from workers.model.cuda.blocks import CudaBlocks
from workers.model.families.base import Family
from workers.model.families.registry import load_family
from workers.model.layers import AttentionModel
from workers.model.loading import mxfp4, packed_integers, scaled_blocks
from workers.model.loading.expert_form import kept_banks
from workers.model.loading.file_stamp import FileStamp, size_and_change
from workers.model.loading.mapped import joined
from workers.model.loading.weight_files import (
    TensorEntry,
    entries_of,
    read_header,
    read_json,
    weight_files,
)
from workers.model.native.blocks import NativeBlocks
from workers.native import memory
from workers.native.team import Team
from workers.quantization.formats import WeightFormat
from workers.quantization.matrix import QuantizedMatrix

Progress = Callable[[int, int], None]
"""Called with (bytes loaded, bytes in total) after each tensor."""

_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    scaled_blocks.DTYPE: torch.float8_e4m3fn,
}
_BLOCK_DTYPES = {mxfp4.DTYPE: torch.uint8}
"""Of numbers in blocks of MXFP4."""
_PACKED_DTYPES = {**_DTYPES, "I32": torch.int32}
"""Of packed integers, their scales and zero points."""


class Checkpoint:
    """An opened checkpoint: the parsed config and the header of each file, no tensor data."""

    def __init__(
        self,
        path: Path | str,
        progress: Progress | None = None,
        quantize: Quantize = "none",
        *,
        has_predictor: bool = False,
    ) -> None:
        """Read config and headers. ``quantize`` as in ``ModelSection``; ``has_predictor``: see
        ``Family.with_predictor``.

        Raises ``CheckpointError`` naming what is wrong, and ``ConfigError`` where the model cannot
        be quantized.
        """
        self.path = Path(path)
        self.family = _family(self.path, has_predictor)
        self.config = self.family.config
        weights = weight_files(self.path)
        self._stamps = {file: FileStamp.of(file) for file in weights.files}
        self._headers, digest = _read_headers(self.path, self._stamps)
        self.tensors, self._unclear = weights.choose(self._headers)
        """All tensors by name; why there is none of a name."""
        self.checkpoint_id = _checkpoint_id(digest, self.tensors, self._headers, self.path)
        """A hash of config.json, all headers, the files that tensors are from, sizes and samples of
        the data (16 hex digits)."""
        self.loaded_bytes = 0
        """Bytes on disk of what was read so far."""
        self._readers: dict[Path, tuple[Any, tuple[int, int]]] = {}
        """Open files, each with ``size_and_change`` before anything was read from it."""
        self._progress = progress
        self._total_bytes = 0
        dtypes = {name: entry.dtype for name, entry in self.tensors.items()}
        self.family.banks = kept_banks(quantize, self.family, dtypes)
        self.keeps_codes = quantize == "auto"
        """Experts that have a form (``ExchangeSpec.form``) are stored in it; else they are
        quantized while they are loaded.
        """

    def another(self) -> Checkpoint:
        """The same checkpoint for another thread: the headers are shared, nothing else is.

        It reports no progress.
        """
        twin = copy(self)
        twin._readers, twin._progress = {}, None
        return twin

    def expect(self, num_bytes: int) -> None:
        """Announce bytes that will be read, for the progress callback."""
        self._total_bytes += num_bytes

    def count(self, num_bytes: int) -> None:
        """Bytes that were announced are in memory, from here or from elsewhere."""
        self.loaded_bytes += num_bytes
        if self._progress is not None:
            self._progress(self.loaded_bytes, max(self._total_bytes, self.loaded_bytes))

    def num_bytes(self, part: TensorPart) -> int:
        """Bytes on disk of a part, with its scales if it has any."""
        total = sum(entry.num_bytes for entry in self._entries(part))
        if part.index is not None:
            total //= max(part.shape[0], 1)
        return total if part.rows is None else total // part.rows[1]

    def _entries(self, part: TensorPart) -> list[TensorEntry]:
        """The tensors on disk that make up a part."""
        if part.is_mxfp4:
            return [self._entry(own, _BLOCK_DTYPES) for own in mxfp4.stored_parts(part)]
        if (packed := self._packed_parts(part)) is not None:
            return [self._entry(own, _PACKED_DTYPES) for own in packed]
        entry = self._entry(part)
        if entry.dtype == scaled_blocks.DTYPE:
            return [entry, self._entry(self._scales(part)[0])]
        return [entry]

    def _packed_parts(self, part: TensorPart) -> list[TensorPart] | None:
        """The tensors of a matrix that is stored as packed integers; None: it is not."""
        stored = self.config.stored
        if stored is None:
            return None
        codes = packed_integers.codes_name(part.name, stored)
        if codes not in self.tensors:
            return None
        if part.name in self.tensors:
            raise CheckpointError(f"tensors {part.name} and {codes} are the same matrix")
        return packed_integers.stored_parts(part, stored)

    def expert_bytes(self, bank: BankSpec, expert: int) -> int:
        """Bytes on disk of one expert in all exchanges of its bank."""
        return sum(map(self.num_bytes, self._expert_parts(bank, expert)))

    def _expert_parts(self, bank: BankSpec, expert: int) -> Iterator[TensorPart]:
        for exchange in bank.exchanges:
            for matrix in self.family.expert_matrices(bank, exchange.index, expert, self.tensors):
                yield from matrix.parts

    def read_quantized(self, matrix: ExpertMatrix, form: WeightFormat) -> QuantizedMatrix:
        """One matrix of an expert as it is stored, where the checkpoint ``keeps_codes``.

        Its memory may be the mapped file's own, valid until the checkpoint is closed.
        """
        found = [self._quantized(part, form) for part in matrix.parts]
        for part in matrix.parts:
            self.count(self.num_bytes(part))
        if len(found) == 1:
            return found[0]
        whole = [torch.cat(parts) for parts in zip(*(m.parts for m in found), strict=True)]
        return QuantizedMatrix.of_parts(form, matrix.shape, whole)

    def _quantized(self, part: TensorPart, form: WeightFormat) -> QuantizedMatrix:
        if part.is_mxfp4:
            parts = mxfp4.stored_parts(part)
            return mxfp4.as_stored(*(self._stored(own, _BLOCK_DTYPES) for own in parts))
        if (packed := self._packed_parts(part)) is not None:
            return self._unpacked(part, packed)
        return scaled_blocks.as_stored(*self._scaled(part), form)

    def _unpacked(self, part: TensorPart, packed: Sequence[TensorPart]) -> QuantizedMatrix:
        """A matrix that is stored as packed integers."""
        stored = self.config.stored
        assert stored is not None
        tensors = [self._stored(own, _PACKED_DTYPES) for own in packed]
        name, groups = packed_integers.groups_name(part.name), None
        if name in self.tensors:
            shape = (part.shape[1],)
            groups = self._stored(TensorPart(name=name, shape=shape), _PACKED_DTYPES)
        return packed_integers.as_stored(part, stored, tensors, groups)

    def read_stacked(
        self, parts: Sequence[TensorPart], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """Parts [rows_i, ..] one under the other: [sum of rows_i, ..], in ``out`` if given.

        Converted to ``dtype``, in memory of its own on the CPU.
        """
        return self._stack(parts, map(self._mapped, parts), dtype, out)

    def borrow(
        self, parts: Sequence[TensorPart], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """The same for a caller that copies it: where possible, the mapped file itself."""
        found = [self._mapped(part) for part in parts]
        whole = joined(found) if all(t.dtype == dtype for t in found) else None
        if whole is None:
            return self._stack(parts, found, dtype, out)
        for part in parts:
            self.count(self.num_bytes(part))
        return whole

    def _stack(
        self,
        parts: Sequence[TensorPart],
        found: Iterable[Tensor],
        dtype: torch.dtype,
        out: Tensor | None,
    ) -> Tensor:
        if out is None:
            rows = sum(p.part_shape[0] for p in parts)
            out = memory.empty((rows, *parts[0].part_shape[1:]), dtype)
        first = 0
        for part, tensor in zip(parts, found, strict=True):
            last = first + part.part_shape[0]
            target = out[first:last]
            target.copy_(tensor.reshape(target.shape))  # a bias may be wanted as a matrix
            self.count(self.num_bytes(part))
            first = last
        return out

    def confirm(self) -> None:
        """Check that the files read since the last ``close`` are still those that were opened.

        A mapped file shows what is written into it later. Raises ``CheckpointError``.
        """
        for file, (_, opened) in self._readers.items():
            if size_and_change(file) != opened:
                raise CheckpointError(f"{file.name} changed while it was read")

    def close(self) -> None:
        """Unmap all files; a later read opens them again."""
        self._readers.clear()

    def _entry(self, part: TensorPart, known: Collection[str] = tuple(_DTYPES)) -> TensorEntry:
        entry = self.tensors.get(part.name)
        if entry is None:
            reason = self._unclear.get(part.name, "")
            raise CheckpointError(
                f"tensor {part.name} {list(part.shape)} is missing in {self.path.name}{reason}"
            )
        if entry.shape != part.shape:
            raise CheckpointError(
                f"tensor {part.name} has shape {list(entry.shape)} on disk, "
                f"the config asks for {list(part.shape)}"
            )
        if entry.dtype not in known:
            raise CheckpointError(
                f"tensor {part.name} has dtype {entry.dtype}, supported are {', '.join(known)}"
            )
        return entry

    def _scales(self, part: TensorPart) -> tuple[TensorPart, tuple[int, int]]:
        """Of a float8 matrix, and the size of a block with one scale."""
        stored = self.config.stored
        if stored is None or stored.method != "fp8" or len(part.part_shape) != 2:
            raise CheckpointError(
                f"tensor {part.name} has dtype {scaled_blocks.DTYPE}, which needs a matrix, and "
                "weight_block_size in quantization_config"
            )
        return scaled_blocks.scales_of(part, stored.block), stored.block

    def _mapped(self, part: TensorPart) -> Tensor:
        """The mapped file's own memory, or new memory for what is stored in blocks with scales."""
        if part.is_mxfp4:
            parts = mxfp4.stored_parts(part)
            return mxfp4.decoded(*(self._stored(own, _BLOCK_DTYPES) for own in parts))
        if (packed := self._packed_parts(part)) is not None:
            return self._unpacked(part, packed).dequantized()
        if self._entry(part).dtype != scaled_blocks.DTYPE:
            return self._stored(part)
        return scaled_blocks.unscaled(*self._scaled(part))

    def _scaled(self, part: TensorPart) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """A float8 matrix as it is stored, its scales, and the size of a block with one scale."""
        scales, block = self._scales(part)
        stored = self._stored(part)
        scaled_blocks.check_codes(stored, part.name)
        return stored, self._stored(scales), block

    def _stored(self, part: TensorPart, known: Collection[str] = tuple(_DTYPES)) -> Tensor:
        entry = self._entry(part, known)
        try:
            reader = self._reader(entry.file)
            if part.index is None:
                found: Tensor = reader.get_tensor(part.name)
            else:
                found = reader.get_slice(part.name)[part.index]
        except (OSError, SafetensorError) as err:
            words = str(err).replace(str(entry.file), entry.file.name)
            raise CheckpointError(f"{entry.file.name}: tensor {part.name}: {words}") from err
        found = found.T if part.is_transposed else found
        return found if part.rows is None else found[part.rows[0] :: part.rows[1]]

    def _reader(self, file: Path) -> Any:
        """An open file. Header, size, time and samples must be those that were read at first."""
        if file not in self._readers:
            opened = size_and_change(file)
            reader = safe_open(file, framework="pt")
            is_same = entries_of(reader, file) == self._headers[file]
            if not is_same or FileStamp.of(file) != self._stamps[file]:
                what = "data" if is_same else "header"
                raise CheckpointError(
                    f"{file.name} is not the file of this checkpoint any more: its {what} changed"
                )
            self._readers[file] = reader, opened
        return self._readers[file][0]


def load_attention_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    max_positions: int | None = None,
    compute_threads: ComputeThreads | None = None,
    deterministic: bool = False,
    team: Team | None = None,
    form: WeightFormat | None = None,
) -> AttentionModel:
    """Everything but the routed experts. ``max_positions`` bounds the table of rotations.

    With a ``team``, native kernels compute, on the CPU. Else ``compute_threads`` share the large
    products; None: the calling thread does them alone, as always where it is ``deterministic`` or
    on a GPU. ``form``: see ``NativeBlocks``; it needs a team.

    Raises ``CheckpointError``, and ``ConfigError`` where this machine cannot be deterministic.
    """
    family = checkpoint.family
    checkpoint.expect(sum(checkpoint.num_bytes(p) for p in family.attention_tensors()))
    try:
        if team is not None and device.type == "cpu":
            blocks: BuildingBlocks = NativeBlocks(team, form)
        elif deterministic:
            blocks = RowInvariantBlocks(device)
        elif device.type == "cuda":
            blocks = CudaBlocks()
        else:
            blocks = BuildingBlocks(compute_threads)
        model = family.attention_model(checkpoint, dtype, device, max_positions, blocks)
        checkpoint.confirm()
        return model
    finally:
        checkpoint.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSummary:
    """What ``check_checkpoint`` found."""

    family: Family
    checkpoint_id: str
    attention_bytes: int
    """Bytes on disk of what each attention worker loads; 0 where nothing is on disk."""
    expert_bytes: int
    """Bytes on disk of all experts of all banks together."""
    attention_weights: int
    """Weights that an attention rank holds."""
    attention_values: int
    """Weights that an attention rank reads in each step: an embedding of its own is looked up."""
    expert_values: tuple[int, ...]
    """By bank, weights of one expert."""


def _family(path: Path, has_predictor: bool) -> Family:
    family = load_family(read_config(path))
    return family.with_predictor() if has_predictor else family


def check_checkpoint(
    path: Path | str, quantize: Quantize = "none", *, has_predictor: bool = False
) -> CheckpointSummary:
    """Read config and headers only, and check every tensor's presence, shape and dtype.

    Raises ``CheckpointError`` naming the first thing that is wrong, and ``ConfigError`` where the
    model cannot be quantized.
    """
    checkpoint = Checkpoint(path, quantize=quantize, has_predictor=has_predictor)
    family = checkpoint.family
    return replace(
        _summary_of(family),
        checkpoint_id=checkpoint.checkpoint_id,
        attention_bytes=sum(checkpoint.num_bytes(p) for p in family.attention_tensors()),
        expert_bytes=sum(
            checkpoint.expert_bytes(bank, e)
            for bank in family.banks
            for e in range(bank.num_experts)
        ),
    )


def plan_checkpoint(
    path: Path | str, quantize: Quantize = "none", *, has_predictor: bool = False
) -> CheckpointSummary:
    """The same numbers from ``config.json`` alone: nothing is on disk. Raises as the other.

    For plans of models without their weights.
    """
    family = _family(Path(path), has_predictor)
    family.banks = kept_banks(quantize, family, {})
    return _summary_of(family)


def _summary_of(family: Family) -> CheckpointSummary:
    config = family.config
    weights = sum(math.prod(part.part_shape) for part in family.attention_tensors())
    is_looked_up = bool(config.labels) or not config.tie_word_embeddings
    return CheckpointSummary(
        family=family,
        checkpoint_id="",
        attention_bytes=0,
        expert_bytes=0,
        attention_weights=weights,
        attention_values=weights - is_looked_up * config.vocab_size * config.hidden_size,
        expert_values=tuple(
            sum(math.prod(shape) for _, _, shape in bank.matrices) for bank in family.banks
        ),
    )


def auto_dtype(config: ModelConfig) -> str:
    """Compute dtype of ``--dtype auto``: the checkpoint's own, or float32 for float16."""
    return "float32" if config.dtype == "float16" else config.dtype


def resolve_dtype(setting: str, config: ModelConfig) -> torch.dtype:
    """Compute dtype for ``--dtype``. Raises ``ConfigError`` for an unsupported one."""
    name = auto_dtype(config) if setting == "auto" else setting
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in known:
        raise ConfigError(
            "dtype", name, f"must be one of {', '.join(known)}: choose one explicitly"
        )
    return known[name]


def read_config(path: Path) -> dict[str, Any]:
    """``config.json`` of a folder, with the eos ids of ``generation_config.json`` added."""
    if not path.is_dir():
        raise CheckpointError(f"{path.name}: no such folder")
    config = read_json(path / "config.json")
    if (path / "generation_config.json").is_file():
        extra = _id_list(read_json(path / "generation_config.json").get("eos_token_id"))
        own = _id_list(config.get("eos_token_id"))
        config["eos_token_id"] = own + [token for token in extra if token not in own]
    return config


def _id_list(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(v) for v in value] if isinstance(value, list) else [int(value)]


def _read_headers(
    path: Path, stamps: Mapping[Path, FileStamp]
) -> tuple[dict[Path, dict[str, TensorEntry]], Any]:
    """All tensors of each file, and a hash of them and of config.json."""
    digest = hashlib.sha256((path / "config.json").read_bytes())
    headers: dict[Path, dict[str, TensorEntry]] = {}
    for file, stamp in stamps.items():
        headers[file] = found = read_header(file)
        digest.update(f"{stamp.num_bytes} {stamp.samples}\n".encode())
        for name, entry in sorted(found.items()):
            digest.update(f"{file.name} {name} {entry.dtype} {entry.shape}\n".encode())
    return headers, digest


def _checkpoint_id(
    digest: Any,
    tensors: Mapping[str, TensorEntry],
    headers: Mapping[Path, Mapping[str, TensorEntry]],
    path: Path,
) -> str:
    """What is not in the headers is added: which file has a tensor that several have."""
    copies = Counter(name for header in headers.values() for name in header)
    for name, entry in sorted(tensors.items()):
        if copies[name] > 1:
            digest.update(f"{name} is in {entry.file.relative_to(path)}\n".encode())
    return str(digest.hexdigest()[:16])
