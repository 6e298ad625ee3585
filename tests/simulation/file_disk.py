"""Disks with real files, between whose calls anything may happen.

The gateways share one, with their state; each host with workers has one of its own, with KV blocks.
Each call takes time, in which its process may die, and fails now and then while the disk does. A
write that fails has written a part. An event loop must not call it at all. Files have the times of
the simulation, and folders are listed in the order of the names, so that a seed decides both.
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

SHARED_S = 0.002
"""Longest time that a call of a shared disk takes."""
LOCAL_S = 0.0002
"""The same of a local one."""
_HANG_S = 3.0
"""The same while the disk hangs."""
_FAILED = 0.3
"""Part of the calls that fail while the disk does."""
_EPOCH_S = 1.7e9
"""Time of day at the beginning of the simulation's time, as in ``Kernel.time``."""
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
_PATH_CALLS = (
    "open",
    "rename",
    "replace",
    "unlink",
    "mkdir",
    "rmdir",
    "scandir",
    "listdir",
    "stat",
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
    ROTS = "a byte of what is read is another one"


FAILURES = (Ailment.FAILS, Ailment.FULL, Ailment.HANGS)
"""What a process hears of."""


class FileDisk:
    """See the module.

    Args:
        kernel: of the simulation.
        folder: where the files are.
        call_s: longest time that a call takes.
    """

    def __init__(self, kernel: Kernel, folder: Path, call_s: float) -> None:
        self._kernel = kernel
        self._call_s = call_s
        self.folder = folder
        self.ailments: dict[str, Ailment] = {}
        """What is wrong, by the host that calls."""
        self.may_block: Process | None = None
        """A process that starts, and calls the disk from its only thread."""
        self.num_calls = self.num_failed = self.num_rotten = 0
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
                setattr(os, name, self._for_handle(name, real[name], real["utime"]))
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
        ailment = self._ailment()
        self.num_calls += 1
        if kernel.fiber is None:
            kernel.failures.append(f"an event loop of {kernel.process.name} calls {name}")
            return
        longest_s = _HANG_S if ailment is Ailment.HANGS else self._call_s
        kernel.sleep(kernel.rng.random() * longest_s)
        if name == "close":
            return
        writes = name in ("write", "pwrite", "mkdir", "open")
        ailment = self._ailment()
        if ailment is Ailment.FULL and writes:
            self._fail(errno.ENOSPC)
        if ailment is Ailment.FAILS and kernel.rng.random() < _FAILED:
            self._fail(kernel.rng.choice((errno.EIO, errno.EDQUOT)))

    def _ailment(self) -> Ailment:
        process = self._kernel.process
        return self.ailments.get(process.host if process is not None else "", Ailment.NONE)

    def _stamp(self, file: Any, set_time: Callable[..., object]) -> None:
        """The disk has a clock of its own."""
        time_ns = int((_EPOCH_S + self._kernel.now) * 1e9)
        set_time(file, ns=(time_ns, time_ns))

    def _as_read(self, data: bytes) -> bytes:
        """What a read returns."""
        rng = self._kernel.rng
        if self._ailment() is Ailment.ROTS and data and rng.random() < _FAILED:
            found = bytearray(data)
            found[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            self.num_rotten += 1
            return bytes(found)
        return data

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
            if is_here and name == "utime" and not args and not options:
                return self._stamp(path, real)
            found = real(path, *args, **options)
            if is_here and name == "open" and self._kernel.process is not None:
                self.handles[found] = self._kernel.process
            if is_here and name == "listdir":
                return sorted(found)
            return _Listing(found) if is_here and name == "scandir" else found

        return call

    def _for_handle(
        self, name: str, real: Callable[..., Any], set_time: Callable[..., object]
    ) -> Callable[..., Any]:
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
            found = real(handle, *args)
            if name in ("write", "pwrite"):
                self._stamp(handle, set_time)
            return self._as_read(found) if name == "read" else found

        return call

    def _opener(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """``io.open``: files are written without a buffer, by ``os.write``."""

        def open_file(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if not self._is_here(file):
                return real(file, mode, *args, **options)
            if "w" in mode:
                is_open = isinstance(file, int)
                return _Unbuffered(file if is_open else os.open(file, _WRITE))
            if not isinstance(file, int):
                self.call("open")
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

    def write(self, data: bytes | memoryview | str) -> int:
        data = data.encode() if isinstance(data, str) else data
        done = 0
        while done < len(data):
            done += os.write(self._handle, data[done:])
        return done

    def flush(self) -> None:
        """Nothing is kept here."""

    def fileno(self) -> int:
        return self._handle


class SimFile:
    """``io.FileIO`` for reading: a file without a buffer, whose calls are those of ``os``."""

    def __init__(self, path: Any, *, opener: Callable[[Any, int], int]) -> None:
        self._handle = opener(path, os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> SimFile:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._handle)

    def read(self, size: int) -> bytes:
        return os.read(self._handle, size)

    def readinto(self, buffer: memoryview) -> int:
        data = os.read(self._handle, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def fileno(self) -> int:
        return self._handle


class _Listing:
    """What ``os.scandir`` returns, in the order of the names."""

    def __init__(self, found: Any) -> None:
        with found:
            self._entries = iter(sorted(found, key=lambda entry: entry.name))

    def __enter__(self) -> Iterator[Any]:
        return self._entries

    def __exit__(self, *error: object) -> None:
        """Nothing is open."""

    def __iter__(self) -> Iterator[Any]:
        return self._entries


@contextmanager
def file_disk(kernel: Kernel, call_s: float) -> Iterator[FileDisk]:
    """A disk in a folder of its own, which is removed in the end."""
    with tempfile.TemporaryDirectory(prefix="expertmesh-disk-") as folder:
        disk = FileDisk(kernel, Path(folder), call_s)
        with disk.mounted():
            yield disk
