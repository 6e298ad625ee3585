"""Mapped weight files, and tensors that share their memory."""

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
    """Memory-mapped files, checked to be the files of the first read. Used by one thread."""

    def __init__(self, headers: Headers, stamps: Mapping[Path, FileStamp]) -> None:
        self._headers = headers
        self._stamps = stamps
        self._readers: dict[Path, tuple[Any, tuple[int, int]]] = {}
        """Open files, each with the ``size_and_change`` from before the first read."""

    def another(self) -> MappedFiles:
        """Return the same files for another thread; only headers and stamps are shared."""
        return MappedFiles(self._headers, self._stamps)

    def read(self, file: Path, name: str, index: int | None) -> Tensor:
        """Return a tensor, or its entry ``index``, in mapped memory. Raises ``CheckpointError``."""
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
        """Check that the files read since the last ``close`` are unchanged.

        The check is needed as a mapped file shows later writes. Raises ``CheckpointError``.
        """
        for file, (_, opened) in self._readers.items():
            if size_and_change(file) != opened:
                raise CheckpointError(f"{file.name} changed while it was read")

    def close(self) -> None:
        """Unmap all files; a later read opens them again."""
        self._readers.clear()

    def _reader(self, file: Path) -> Any:
        """Return an open file. Its header, size, time and samples must match the first read."""
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
    """Return CPU tensors [rows_i, ..] of one dtype as [sum of rows_i, ..] in the same memory.

    Returns None unless they are adjacent in memory. They often are, as libraries write the tensors
    of a file in order of their names: ``gate_proj`` of an expert, then its ``up_proj``.
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
