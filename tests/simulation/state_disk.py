"""The disk with the gateways' state: real files, between whose calls anything may happen.

Each call takes time, in which its gateway may die, and fails now and then while the disk does. A
write that fails has written a part. An event loop must not call it at all.
"""

from __future__ import annotations

import errno
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from tests.simulation.kernel import Kernel, Process

_CALL_S = 0.002
"""Longest time that a call takes."""
_HANG_S = 3.0
"""The same while the disk hangs."""
_FAILED = 0.3
"""Part of the calls that fail while the disk does."""
_PATH_CALLS = (
    "open",
    "rename",
    "replace",
    "unlink",
    "mkdir",
    "rmdir",
    "scandir",
    "listdir",
    "utime",
    "statvfs",
)
_HANDLE_CALLS = ("write", "pwrite", "read", "fsync", "ftruncate", "close")


class Ailment(Enum):
    """What is wrong with the disk."""

    NONE = "nothing"
    FAILS = "calls fail"
    FULL = "nothing can be written"
    HANGS = "calls take long"


class StateDisk:
    """See the module.

    Args:
        kernel: of the simulation.
        folder: where the files are.
    """

    def __init__(self, kernel: Kernel, folder: Path) -> None:
        self._kernel = kernel
        self.folder = folder
        self.ailment = Ailment.NONE
        self.may_block: Process | None = None
        """A process that starts, and calls the disk from its only thread."""
        self.num_calls = self.num_failed = 0
        self.handles: dict[int, Process] = {}
        """Open files, with their processes."""

    @contextmanager
    def mounted(self) -> Iterator[None]:
        """Calls of simulated processes for files in the folder come here meanwhile."""
        real = {name: getattr(os, name) for name in (*_PATH_CALLS, *_HANDLE_CALLS)}
        plain_open = io.open
        try:
            for name in _PATH_CALLS:
                setattr(os, name, self._for_path(name, real[name]))
            for name in _HANDLE_CALLS:
                setattr(os, name, self._for_handle(name, real[name]))
            io.open = self._opener(plain_open)
            yield
        finally:
            io.open = plain_open
            for name, call in real.items():
                setattr(os, name, call)
            for handle in self.handles:
                os.close(handle)

    def close_of(self, process: Process) -> None:
        """A process has died: the kernel closes its files."""
        for handle in [h for h, owner in self.handles.items() if owner is process]:
            del self.handles[handle]
            os.close(handle)

    def call(self, name: str) -> None:
        """A call of the process that runs now. Raises ``OSError``."""
        kernel = self._kernel
        if kernel.process is None or kernel.process is self.may_block or kernel.is_over:
            return
        self.num_calls += 1
        if kernel.fiber is None:
            kernel.failures.append(f"an event loop of {kernel.process.name} calls {name}")
            return
        longest_s = _HANG_S if self.ailment is Ailment.HANGS else _CALL_S
        kernel.sleep(kernel.rng.random() * longest_s)
        if name == "close":
            return
        writes = name in ("write", "pwrite", "mkdir", "open")
        if self.ailment is Ailment.FULL and writes:
            self._fail(errno.ENOSPC)
        if self.ailment is Ailment.FAILS and kernel.rng.random() < _FAILED:
            self._fail(kernel.rng.choice((errno.EIO, errno.EDQUOT)))

    def _fail(self, number: int) -> None:
        self.num_failed += 1
        raise OSError(number, os.strerror(number))

    def _is_here(self, path: object) -> bool:
        if isinstance(path, int):
            return path in self.handles
        return isinstance(path, str | Path) and str(path).startswith(str(self.folder))

    def _for_path(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **options: Any) -> Any:
            is_here = self._is_here(path)
            if is_here:
                self.call(name)
            found = real(path, *args, **options)
            if is_here and name == "open" and self._kernel.process is not None:
                self.handles[found] = self._kernel.process
            return found

        return call

    def _for_handle(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(handle: int, *args: Any) -> Any:
            if handle not in self.handles:
                return real(handle, *args)
            try:
                self.call(name)
            except OSError:
                if name == "write" and len(args[0]) > 1:
                    real(handle, args[0][: len(args[0]) // 2])
                raise
            if name == "close":
                self.handles.pop(handle, None)
            return real(handle, *args)

        return call

    def _opener(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """``io.open``: files are written without a buffer, by ``os.write``."""

        def open_file(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if not self._is_here(file):
                return real(file, mode, *args, **options)
            if not isinstance(file, int):
                self.call("open")
            elif "w" in mode:
                return _Unbuffered(file)
            return real(file, mode, *args, **options)

        return open_file


class _Unbuffered:
    """A file object of a handle."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __enter__(self) -> _Unbuffered:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._handle)

    def write(self, data: bytes) -> int:
        done = 0
        while done < len(data):
            done += os.write(self._handle, data[done:])
        return done

    def flush(self) -> None:
        """Nothing is kept here."""

    def fileno(self) -> int:
        return self._handle


@contextmanager
def state_disk(kernel: Kernel) -> Iterator[StateDisk]:
    """A disk in a folder of its own, which is removed in the end."""
    with tempfile.TemporaryDirectory(prefix="expertmesh-state-") as folder:
        disk = StateDisk(kernel, Path(folder))
        with disk.mounted():
            yield disk
