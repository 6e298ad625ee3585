"""Tensors of a Hugging Face folder by name and slice.

Files are mapped while weights are read and closed afterwards (``MappedFiles.close``). The peak of
private memory is the loaded weights plus one tensor of a layer, as the head is loaded first.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.config.model import Quantize
from cluster.core.errors import CheckpointError
from workers.model.config import BankSpec, ExpertMatrix, TensorPart
from workers.model.loading import mxfp4, packed_integers, scaled_blocks
from workers.model.loading.config_file import read_family
from workers.model.loading.expert_format import kept_banks
from workers.model.loading.file_stamp import FileStamp
from workers.model.loading.mapped import MappedFiles, joined
from workers.model.loading.weight_files import TensorEntry, read_header, weight_files
from workers.native import memory
from workers.quantization.formats import WeightFormat
from workers.quantization.matrix import QuantizedMatrix

Progress = Callable[[int, int], None]
"""Progress callback, called with (bytes loaded, total bytes) after each tensor."""

_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    scaled_blocks.DTYPE: torch.float8_e4m3fn,
}
_BLOCK_DTYPES = {mxfp4.DTYPE: torch.uint8}
"""Dtypes allowed for MXFP4 blocks and their scales, by safetensors name."""
_PACKED_DTYPES = {**_DTYPES, "I32": torch.int32}
"""Dtypes allowed for packed integers, their scales and zero points, by safetensors name."""


class Checkpoint:
    """An open checkpoint: the parsed config and the header of each file, without tensor data."""

    def __init__(
        self,
        path: Path | str,
        progress: Progress | None = None,
        quantize: Quantize = "none",
        *,
        has_predictor: bool = False,
    ) -> None:
        """Read ``config.json`` and the headers of the weight files in the folder ``path``.

        ``quantize``: format of the experts in workers (``--quantize``). ``has_predictor``: whether
        to include the multi-token prediction layer (MTP).

        Raises ``CheckpointError`` naming the problem, and ``ConfigError`` if the model cannot be
        quantized.
        """
        self.path = Path(path)
        self.family = read_family(self.path, has_predictor)
        self.config = self.family.config
        weights = weight_files(self.path)
        stamps = {file: FileStamp.of(file) for file in weights.files}
        headers, digest = _read_headers(self.path, stamps)
        self.files = MappedFiles(headers, stamps)
        """Weight files of the thread that uses this object, mapped while weights are read."""
        self.tensors, self._unclear = weights.choose(headers)
        """All readable tensors by name."""
        self.checkpoint_id = _checkpoint_id(digest, self.tensors, headers, self.path)
        """Hash that identifies the checkpoint, 16 hex digits: of config.json, of all headers, and
        of sizes and samples of the weight files."""
        self.loaded_bytes = 0
        """Bytes (size on disk) of the tensors that were read or received so far."""
        self._progress = progress
        self._total_bytes = 0
        dtypes = {name: entry.dtype for name, entry in self.tensors.items()}
        self.family.banks = kept_banks(quantize, self.family, dtypes)
        self.keeps_codes = quantize == "auto"
        """Whether experts that workers keep in a quantized format (``ExchangeSpec.form``) are
        stored in this format on disk; False: they are quantized during loading."""

    def another(self) -> Checkpoint:
        """Return a ``Checkpoint`` with which another thread can read the same files. It shares the
        headers with this object and reports no progress."""
        twin = copy(self)
        twin.files, twin._progress = self.files.another(), None
        return twin

    def expect(self, num_bytes: int) -> None:
        """Add bytes that will be read to the total that the progress callback reports."""
        self._total_bytes += num_bytes

    def count(self, num_bytes: int) -> None:
        """Report to the progress callback that further bytes are in memory, read from disk or
        received from another worker."""
        self.loaded_bytes += num_bytes
        if self._progress is not None:
            self._progress(self.loaded_bytes, max(self._total_bytes, self.loaded_bytes))

    def num_bytes(self, part: TensorPart) -> int:
        """Return the bytes on disk of a part of a tensor, including scales and zero points."""
        total = sum(entry.num_bytes for entry in self._entries(part))
        if part.index is not None:
            total //= max(part.shape[0], 1)
        return total if part.rows is None else total // part.rows[1]

    def _entries(self, part: TensorPart) -> list[TensorEntry]:
        """Return the tensors on disk in which a part is stored: one tensor or, for quantized
        values, also their scales and zero points."""
        if part.is_mxfp4:
            return [self._entry(own, _BLOCK_DTYPES) for own in mxfp4.stored_parts(part)]
        if (packed := self._packed_parts(part)) is not None:
            return [self._entry(own, _PACKED_DTYPES) for own in packed]
        entry = self._entry(part)
        if entry.dtype == scaled_blocks.DTYPE:
            return [entry, self._entry(self._scales(part)[0])]
        return [entry]

    def _packed_parts(self, part: TensorPart) -> list[TensorPart] | None:
        """Return the tensors of a matrix that is stored as packed integers; None if the matrix is
        stored in another way."""
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
        """Return the bytes on disk of one expert, with its matrices in all exchanges of the
        bank."""
        return sum(map(self.num_bytes, self._expert_parts(bank, expert)))

    def _expert_parts(self, bank: BankSpec, expert: int) -> Iterator[TensorPart]:
        for exchange in bank.exchanges:
            for matrix in self.family.expert_matrices(bank, exchange.index, expert, self.tensors):
                yield from matrix.parts

    def read_quantized(self, matrix: ExpertMatrix, form: WeightFormat) -> QuantizedMatrix:
        """Return one matrix of an expert in the quantized format in which it is stored (only if
        ``keeps_codes``).

        The result may share the memory of the mapped file, valid until the checkpoint is closed.
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
        """Return a matrix that is stored as packed integers, still quantized."""
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
        """Read parts [rows_i, ..] and stack them row over row: [sum of rows_i, ..] on the CPU.

        The numbers are dequantized and converted to ``dtype``. ``out``: memory for the result;
        None: new memory.
        """
        return self._stack(parts, map(self._mapped, parts), dtype, out)

    def borrow(
        self, parts: Sequence[TensorPart], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """Like ``read_stacked``, for a caller that only copies from the result: if possible,
        returns memory of the mapped file, which is valid until the checkpoint is closed."""
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
            target.copy_(tensor.reshape(target.shape))  # a bias may be requested as a matrix
            self.count(self.num_bytes(part))
            first = last
        return out

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
        """Return the tensor with the scales of a float8 matrix, and the size (rows, columns) of a
        block that has one scale."""
        stored = self.config.stored
        if stored is None or stored.method != "fp8" or len(part.part_shape) != 2:
            raise CheckpointError(
                f"tensor {part.name} has dtype {scaled_blocks.DTYPE}, which needs a matrix, and "
                "weight_block_size in quantization_config"
            )
        return scaled_blocks.scales_of(part, stored.block), stored.block

    def _mapped(self, part: TensorPart) -> Tensor:
        """Return a part, dequantized: in memory of the mapped file, or in new memory if the part is
        quantized on disk."""
        if part.is_mxfp4:
            parts = mxfp4.stored_parts(part)
            return mxfp4.decoded(*(self._stored(own, _BLOCK_DTYPES) for own in parts))
        if (packed := self._packed_parts(part)) is not None:
            return self._unpacked(part, packed).dequantized()
        if self._entry(part).dtype != scaled_blocks.DTYPE:
            return self._stored(part)
        return scaled_blocks.unscaled(*self._scaled(part))

    def _scaled(self, part: TensorPart) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Return a float8 matrix as stored, its scales, and the size (rows, columns) of a block
        that has one scale."""
        scales, block = self._scales(part)
        stored = self._stored(part)
        scaled_blocks.check_codes(stored, part.name)
        return stored, self._stored(scales), block

    def _stored(self, part: TensorPart, known: Collection[str] = tuple(_DTYPES)) -> Tensor:
        found = self.files.read(self._entry(part, known).file, part.name, part.index)
        found = found.T if part.is_transposed else found
        return found if part.rows is None else found[part.rows[0] :: part.rows[1]]


def _read_headers(
    path: Path, stamps: Mapping[Path, FileStamp]
) -> tuple[dict[Path, dict[str, TensorEntry]], Any]:
    """Return the tensors by name of each file, and a hash object of config.json, the headers, and
    the sizes and samples in ``stamps``."""
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
    """Return the checkpoint id. Add to ``digest`` the chosen file of each tensor that several files
    have."""
    copies = Counter(name for header in headers.values() for name in header)
    for name, entry in sorted(tensors.items()):
        if copies[name] > 1:
            digest.update(f"{name} is in {entry.file.relative_to(path)}\n".encode())
    return str(digest.hexdigest()[:16])
