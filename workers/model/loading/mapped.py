"""Memory-mapped weight files, and tensors that share the files' memory."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cluster.core.errors import CheckpointError
from workers.model.loading.file_stamp import FileStamp, size_and_change
from workers.model.loading.weight_files import Headers, entries_of


class MappedFiles:
    """Memory-mapped weight files of a checkpoint, for one thread. Files are checked to be unchanged
    since their headers were first read."""

    def __init__(self, headers: Headers, stamps: Mapping[Path, FileStamp]) -> None:
        self._headers = headers
        self._stamps = stamps
        self._readers: dict[Path, tuple[Any, tuple[int, int]]] = {}
        """Open file and the file's ``size_and_change`` from before it was opened, by path."""

    def another(self) -> MappedFiles:
        """Return an object for another thread that maps the same files itself and shares only the
        headers and stamps."""
        return MappedFiles(self._headers, self._stamps)

    def read(self, file: Path, name: str, index: int | None) -> Tensor:
        """Return the tensor ``name`` of a file, or entry ``index`` of its first dimension, in
        mapped memory. Raises ``CheckpointError``."""
        try:
            reader = self._reader(file)
            found: Tensor = (
                reader.get_tensor(name) if index is None else reader.get_slice(name)[index]
            )
        except (OSError, SafetensorError) as err:
            words = str(err).replace(str(file), file.name)
            raise CheckpointError(f"{file.name}: tensor {name}: {words}") from err
        return found

    def confirm(self) -> None:
        """Raise ``CheckpointError`` if a file has changed since it was opened.

        Checks the files read since the latest ``close``. The check is needed because memory of a
        mapped file shows later writes to the file.
        """
        for file, (_, opened) in self._readers.items():
            if size_and_change(file) != opened:
                raise CheckpointError(f"{file.name} changed while it was read")

    def close(self) -> None:
        """Unmap all files; a later read opens them again."""
        self._readers.clear()

    def _reader(self, file: Path) -> Any:
        """Return a reader of a file; open the file if it is not open. Raises ``CheckpointError`` if
        its header or stamp is not the one of the checkpoint."""
        if file not in self._readers:
            opened = size_and_change(file)
            reader = safe_open(file, framework="pt")
            is_same = entries_of(reader, file) == self._headers[file]
            if not is_same or FileStamp.of(file) != self._stamps[file]:
                what = "data" if is_same else "header"
                raise CheckpointError(
                    f"{file.name} is no longer the file of this checkpoint: its {what} changed"
                )
            self._readers[file] = reader, opened
        return self._readers[file][0]


def joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """Join CPU tensors [rows_i, ..] of one dtype to a tensor [sum of rows_i, ..] without a copy.

    Returns None unless the tensors are adjacent in memory. They often are, as libraries write the
    tensors of a file in order of their names: ``gate_proj`` of an expert, then its ``up_proj``.
    """
    first = tensors[0]
    if not all(tensor.is_contiguous() for tensor in tensors):
        return None
    if len(tensors) == 1:
        return first
    if any(a.data_ptr() + a.nbytes != b.data_ptr() for a, b in pairwise(tensors)):
        return None
    memory = (ctypes.c_uint8 * sum(t.nbytes for t in tensors)).from_address(first.data_ptr())
    memory.owners = list(tensors)  # type: ignore[attr-defined]  # as long as the result lives
    rows = sum(t.shape[0] for t in tensors)
    return (
        torch.frombuffer(memory, dtype=torch.uint8).view(first.dtype).view(rows, *first.shape[1:])
    )
