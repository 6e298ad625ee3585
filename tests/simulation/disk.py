"""Disks with the checkpoint, one on each host: slow, broken, or with files that change in place.

``ToyCheckpoint`` is the product's ``Checkpoint`` on such a disk: it takes and compares the stamps
of its files as it does with real ones. An open file is mapped, as safetensors maps it, so a reader
sees what is written into it later, and reading past its new end ends the process.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from cluster.config.model import Quantize
from cluster.core.errors import CheckpointError
from tests.simulation.kernel import Kernel
from tests.simulation.toy_model import (
    BANKS,
    CONFIG,
    NUM_EXPERTS,
    ToyFamily,
    banks,
    matrix_value,
)
from workers.model.loading.checkpoint import Checkpoint
from workers.model.loading.file_stamp import FileStamp
from workers.model.loading.mapped import MappedFiles
from workers.model.loading.weight_files import TensorEntry, WeightFiles

_READ_S = 0.002
"""Mean time to read one matrix."""
SHAPES = BANKS[0].exchanges[0].matrix_shapes
"""Of the matrices of an expert."""
_FILE_BYTES = 4 * NUM_EXPERTS * sum(rows * columns for rows, columns in SHAPES)
_OTHER = 100_000
"""Difference between the values of two versions of a file."""
_FLAKY = 0.1
"""Chance that a read fails on a flaky disk."""


@dataclass(slots=True)
class _File:
    """One file of the checkpoint on one host."""

    version: int = 0
    """Which weights it holds: 0 are those of the checkpoint."""
    modified: int = 0
    """Time of the last write, which a copy from a backup sets back."""
    changed: int = 0
    """Time of the last change."""
    is_short: bool = False
    """Its end is missing."""


class Disk:
    """All disks of one simulation."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.read_s = _READ_S
        self.broken_hosts: set[str] = set()
        """Nothing can be read there."""
        self.flaky_hosts: set[str] = set()
        """Now and then a read fails there."""
        self._files: dict[tuple[str, str], _File] = {}
        self._waiting: set[tuple[str, str]] = set()
        self._writes = 0

    def slow_down(self) -> None:
        """Reads take a hundred times as long, also after a second such fault."""
        self.read_s = 100 * _READ_S

    def recover(self) -> None:
        """As fast as usual."""
        self.read_s = _READ_S

    def repair(self) -> None:
        """Everything is as it was at first."""
        self.recover()
        self.broken_hosts.clear()
        self.flaky_hosts.clear()
        for host, name in self._files:
            self.restore(host, name)

    def _write(self, host: str, name: str) -> _File:
        self._writes += 1
        file = self.file(host, name)
        file.modified = file.changed = self._writes
        return file

    def file(self, host: str, name: str) -> _File:
        return self._files.setdefault((host, name), _File())

    def change(self, host: str, name: str) -> None:
        """Other weights of the same size are written into a file."""
        file = self._write(host, name)
        file.version = file.modified

    def change_when_read(self, host: str, name: str) -> None:
        """The same while somebody reads the file."""
        self._waiting.add((host, name))

    def was_read(self, host: str, name: str) -> None:
        """A matrix was read from an open file; there may be more to read."""
        if (host, name) in self._waiting:
            self._waiting.remove((host, name))
            self.change(host, name)

    def shorten(self, host: str, name: str) -> None:
        """The end of a file is cut off."""
        self._write(host, name).is_short = True

    def restore(self, host: str, name: str) -> None:
        """The file is copied from a backup, with its time."""
        self._waiting.discard((host, name))
        if self.file(host, name).modified:
            file = self._write(host, name)
            file.version, file.modified, file.is_short = 0, 0, False

    def read(self) -> None:
        """Read one matrix. Raises ``OSError``."""
        kernel = self._kernel
        kernel.sleep((0.5 + kernel.rng.random()) * self.read_s)
        host = kernel.process.host if kernel.process is not None else ""
        is_flaky = host in self.flaky_hosts and kernel.rng.random() < _FLAKY
        if is_flaky or host in self.broken_hosts:
            raise OSError(5, "input/output error")

    def opened(self, path: Path) -> _File:
        """A file on this process's host."""
        assert self._kernel.process is not None
        return self.file(self._kernel.process.host, path.name)


def disk() -> Disk:
    """The disks of the simulation that runs."""
    kernel = Kernel.current
    assert kernel is not None
    found: Disk = kernel.disk
    return found


def files() -> list[str]:
    """Names of the checkpoint's files: one for each bank."""
    return [f"{bank.index}.safetensors" for bank in banks()]


class SimReader:
    """In place of ``safe_open``."""

    def __init__(self, path: Path, framework: str = "pt") -> None:
        self._path = path
        self._file = disk().opened(path)
        if self._file.is_short:
            raise SafetensorError("Error while deserializing header: incomplete metadata")

    def get_tensor(self, name: str) -> Tensor:
        disk().read()
        kernel = Kernel.current
        assert kernel is not None
        assert kernel.process is not None
        if self._file.is_short:
            kernel.process.kill("SIGBUS")
            kernel.this_fiber().park()
        bank, expert, matrix = map(int, name.split("."))
        value = matrix_value(bank, expert, matrix) + _OTHER * self._file.version
        disk().was_read(kernel.process.host, self._path.name)
        return torch.full(SHAPES[matrix], float(value))


def entries(reader: object, path: Path) -> dict[str, TensorEntry]:
    """In place of ``entries_of``: all tensors of a file."""
    return {
        f"{path.stem}.{expert}.{matrix}": TensorEntry(file=path, dtype="F32", shape=shape)
        for expert in range(NUM_EXPERTS)
        for matrix, shape in enumerate(SHAPES)
    }


def stamp(path: Path) -> FileStamp:
    """In place of ``FileStamp.of``. Raises ``CheckpointError``."""
    try:
        disk().read()
    except OSError as err:
        raise CheckpointError(f"{path.name} cannot be read: {err.strerror}") from err
    file = disk().opened(path)
    size, _ = size_and_change(path)
    return FileStamp(num_bytes=size, modified_ns=file.modified, samples=str(file.version))


def size_and_change(path: Path) -> tuple[int, int]:
    """In place of ``size_and_change``."""
    file = disk().opened(path)
    return 0 if file.is_short else _FILE_BYTES, file.changed


class ToyCheckpoint(Checkpoint):
    """The checkpoint of the toy model."""

    def __init__(
        self,
        path: Path | str,
        progress: Any = None,
        quantize: Quantize = "none",
        *,
        has_predictor: bool = False,
    ) -> None:
        assert not has_predictor
        self.path = Path(path)
        self.family: Any = ToyFamily()
        self.config = CONFIG
        paths = [self.path / name for name in files()]
        stamps = {file: stamp(file) for file in paths}
        for file, found in stamps.items():
            if not found.num_bytes:
                raise CheckpointError(f"{file.name} is truncated")
        headers = {file: entries(None, file) for file in paths}
        self.files = MappedFiles(headers, stamps)
        self.tensors, self._unclear = WeightFiles(tuple(paths), {}).choose(headers)
        self.checkpoint_id = str([found.samples for found in stamps.values()])
        self.loaded_bytes = 0
        self._progress = progress
        self._total_bytes = 0
