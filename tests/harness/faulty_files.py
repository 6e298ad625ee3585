"""A layer under the files of a folder: calls are counted, and fail, hang or end the process there.

The code under test and the folder are real; ``os`` and ``open`` are replaced for paths below the
folder while a ``FaultyFiles`` is entered.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import pytest

_BY_PATH = (
    *("open", "stat", "lstat", "mkdir", "rmdir", "unlink", "remove", "rename", "replace"),
    *("scandir", "listdir", "utime", "statvfs", "truncate", "link"),
)
_BY_DESCRIPTOR = (
    *("write", "pwrite", "read", "pread", "fsync", "fdatasync", "ftruncate", "fstat", "fchmod"),
    "close",
)
READING = frozenset({"stat", "lstat", "scandir", "listdir", "statvfs", "read", "pread", "fstat"})
"""Calls that change nothing."""


class FileCall(NamedTuple):
    """One call of the system for a file below the folder."""

    name: str
    path: str
    thread: int
    """Identifier of the thread that makes it."""


class Killed(BaseException):
    """The process would be dead: nothing it does has an effect from here on."""


Kind = Literal["error", "partial", "kill before", "kill within", "kill after"]


@dataclass
class Fault:
    """What happens at one call that is not ``close``, and at all later ones that change something
    if it ``lasts``.

    A ``partial`` write writes a half, and the rest of it fails; so does a kill ``within`` one.
    """

    at: int
    """Number of the call, from 0; with ``lasts`` calls that change nothing are not counted."""
    kind: Kind = "error"
    number: int = errno.ENOSPC
    """Of the error."""
    lasts: bool = False
    was_hit: bool = False

    def __str__(self) -> str:
        what = errno.errorcode[self.number] if self.kind in ("error", "partial") else ""
        return f"{self.kind} {what} at call {self.at}{' and after it' if self.lasts else ''}"


FAULTS = (
    *(Fault(0, "error", number) for number in (errno.ENOSPC, errno.EIO, errno.EDQUOT)),
    *(Fault(0, "partial", number) for number in (errno.ENOSPC, errno.EIO)),
    *(Fault(0, "error", number, lasts=True) for number in (errno.ENOSPC, errno.EIO)),
    Fault(0, "partial", errno.EDQUOT, lasts=True),
    Fault(0, "kill before"),
    Fault(0, "kill within"),
    Fault(0, "kill after"),
)


FEW_FAULTS = tuple(FAULTS[number] for number in (1, 3, 6, -1))
"""One of each sort, for work that makes many calls."""


class FaultyFiles:
    """See the module.

    Args:
        folder: the calls of paths below it are seen.
        fault: happens there.
        on_call: called before each call; it may raise, or wait.
    """

    def __init__(
        self,
        folder: Path,
        fault: Fault | None = None,
        on_call: Callable[[FileCall], None] = lambda call: None,
    ) -> None:
        self._root = f"{os.path.realpath(folder)}/"
        self._fault = fault
        self._on_call = on_call
        self._num_calls = 0
        self._is_dead = self._fails_next_write = False
        self._lock = threading.Lock()
        self._patch = pytest.MonkeyPatch()
        self._opened = set[int]()
        self._real_open = builtins.open

    def __enter__(self) -> Self:
        for name in _BY_PATH:
            self._replace(name, lambda given: given)
        for name in _BY_DESCRIPTOR:
            self._replace(name, self._path_of)
        for module in (io, builtins):
            self._patch.setattr(module, "open", self._open)
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.undo()
        for fd in self._opened if self._is_dead else ():  # a killed process has no open files
            # A ``FileIO`` has closed its own: another thread may have opened that number since.
            if self._below(self._path_of(fd)) is not None:
                os.close(fd)

    def heal(self) -> None:
        """No more faults."""
        self._fault, self._fails_next_write = None, False

    def run(self, name: str, path: str, call: Callable[[], Any], half: Callable[[], Any]) -> Any:
        """Make a call, or what the fault makes of it; ``half`` writes a half."""
        self.see(name, path)
        with self._lock:
            kind = self._kind_of(name)
        if kind == "error":
            assert self._fault is not None
            raise OSError(self._fault.number, os.strerror(self._fault.number))
        if kind == "partial":
            self._fails_next_write = True
            return half()
        if kind == "kill within" and name == "write":
            half()
        if kind in ("kill before", "kill within"):
            raise Killed
        found = call()
        if kind == "kill after":
            if hasattr(found, "close"):  # a file, or the iterator of a folder
                found.close()
            raise Killed
        return found

    def see(self, name: str, path: str) -> None:
        """A call is about to be made."""
        self._on_call(FileCall(name, path, threading.get_ident()))

    def _kind_of(self, name: str) -> Kind | None:
        """What happens at the call that comes now."""
        fault = self._fault
        if self._is_dead:
            return "kill before"
        if fault is None or name == "close" or (fault.lasts and name in READING):
            return None
        if self._fails_next_write and name == "write":
            self._fails_next_write = False
            return "error"
        number, self._num_calls = self._num_calls, self._num_calls + 1
        if number < fault.at or (number > fault.at and not fault.lasts):
            return None
        fault.was_hit = True
        if fault.kind == "partial" and (number > fault.at or name != "write"):
            return "error"
        self._is_dead = fault.kind.startswith("kill")
        return fault.kind

    def _replace(self, name: str, path_of: Callable[[Any], Any]) -> None:
        real = getattr(os, name)

        def seen(*args: Any, **options: Any) -> Any:
            given = args[0] if args else "."
            path = self._below(self._path_of(given) if isinstance(given, int) else path_of(given))
            if path is None:
                return real(*args, **options)

            def half() -> Any:
                return real(args[0], args[1][: max(1, len(args[1]) // 2)])

            def call() -> Any:
                found = real(*args, **options)
                if name == "open":
                    self._opened.add(found)
                elif name == "close":
                    self._opened.discard(given)
                return found

            return self.run(name, path, call, half)

        self._patch.setattr(os, name, seen)

    def _below(self, path: Any) -> str | None:
        if path is None or isinstance(path, int):
            return None
        text = os.path.abspath(os.fsdecode(path))
        return text if f"{text}/".startswith(self._root) else None

    def _path_of(self, fd: Any) -> str | None:
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/self/fd/{fd}")
        return None

    def _open(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        path = self._below(self._path_of(file) if isinstance(file, int) else file)
        if path is None:
            return self._real_open(
                file, mode, buffering, encoding, errors, newline, closefd, opener
            )
        plain = mode.replace("b", "").replace("t", "")
        if isinstance(file, int):
            raw = _File(file, plain, closefd)
            if closefd:
                self._opened.discard(file)
        else:
            raw = self.run("open", path, lambda: _File(file, plain, closefd, opener), list)
        raw.seen_by(self, path)
        if "+" in mode:
            buffered: Any = io.BufferedRandom(raw)
        else:
            buffered = io.BufferedReader(raw) if "r" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return raw if buffering == 0 else buffered
        return io.TextIOWrapper(buffered, encoding, errors, newline)


class _File(io.FileIO):
    """A file of ``open``."""

    _files: FaultyFiles | None = None
    _path = ""

    def seen_by(self, files: FaultyFiles, path: str) -> None:
        self._files, self._path = files, path

    def write(self, content: Any, /) -> int:
        assert self._files is not None
        raw, write = bytes(content), super().write
        if self._files._is_dead:
            return len(raw)  # what a buffer writes when it is collected
        found: int = self._files.run(
            "write", self._path, lambda: write(raw), lambda: write(raw[: max(1, len(raw) // 2)])
        )
        return found

    def readinto(self, buffer: Any, /) -> int:
        assert self._files is not None
        read = super().readinto
        found: int = self._files.run("read", self._path, lambda: read(buffer), lambda: 0)
        return found

    def close(self) -> None:
        if self._files is not None and not self.closed:
            self._files.see("close", self._path)
        super().close()

    def readall(self) -> bytes:
        assert self._files is not None
        read = super().readall
        found: bytes = self._files.run("read", self._path, read, bytes)
        return found


def each_fault(
    folder: Path,
    prepare: Callable[[Path], None] = lambda folder: None,
    kinds: Sequence[Fault] = FAULTS,
) -> Iterator[tuple[Path, Fault]]:
    """A new folder, and a fault for it: every kind, at every call that the work on it makes.

    ``prepare`` fills a folder. The body must enter a ``FaultyFiles`` with the fault; the next kind
    comes when a fault was not hit. Nothing is synced: the machine survives.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield from _each_fault(folder, prepare, kinds)


def _each_fault(
    folder: Path, prepare: Callable[[Path], None], kinds: Sequence[Fault]
) -> Iterator[tuple[Path, Fault]]:
    for kind in kinds:
        number = 0
        while True:
            fault = Fault(number, kind.kind, kind.number, kind.lasts)
            place = folder / str(fault).replace(" ", "-")
            place.mkdir()
            prepare(place)
            yield place, fault
            if not fault.was_hit:
                break
            number += 1
        assert number, f"no call met {kind}"
