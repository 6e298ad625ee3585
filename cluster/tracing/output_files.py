"""The files behind this process's standard output and error: they are rotated.

Ray gives every process of its own two files. Where it is to rotate them
(``RAY_ROTATION_MAX_BYTES``) it puts a pipe and a thread of the same process before them, and what
is in the pipe is lost when the process is killed or crashes. So here the streams are led to their
files again.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

MAX_BYTES = 16 * 1024 * 1024
"""Size at which a new file begins; the one before is kept."""
LIMIT_VARIABLE = "RAY_ROTATION_MAX_BYTES"
"""Ray's own: sets another size."""
_STREAMS = {1: ".out", 2: ".err"}
"""Descriptors of the streams, and how Ray ends the names of their files."""
_OPEN = os.O_WRONLY | os.O_CREAT | os.O_APPEND
_DESCRIPTORS = Path("/proc/self/fd")


class OutputFiles:
    """Those of this process. Call it from one thread at a time."""

    def __init__(self) -> None:
        self._paths: dict[int, Path] = {}
        self._max_bytes = MAX_BYTES

    @property
    def folder(self) -> Path | None:
        """Where they are; None where the streams are no files of Ray's."""
        return next((path.parent for path in self._paths.values()), None)

    def take(self) -> None:
        """Lead the streams to the files that Ray has opened for them, if it has."""
        self._max_bytes = int(os.environ.get(LIMIT_VARIABLE) or 0) or MAX_BYTES
        for stream, suffix in _STREAMS.items():
            path = _file_of(stream, suffix)
            if path is not None:
                with contextlib.suppress(OSError):
                    _lead(stream, path)
                    self._paths[stream] = path

    def rotate(self) -> None:
        """Begin new files in place of those that have reached their size.

        On a full disk the old ones go on.
        """
        for stream, path in self._paths.items():
            if os.fstat(stream).st_size >= self._max_bytes:
                with contextlib.suppress(OSError):
                    _begin(stream, path)


def previous(path: Path) -> Path:
    """Name of the file before one, as Ray gives it."""
    return path.with_name(f"{path.stem}.1{path.suffix}")


def _begin(stream: int, path: Path) -> None:
    path.replace(previous(path))
    try:
        _lead(stream, path)
    except OSError:
        previous(path).replace(path)
        raise


def _lead(stream: int, path: Path) -> None:
    file = os.open(path, _OPEN, 0o644)
    try:
        os.dup2(file, stream)
    finally:
        os.close(file)


def _file_of(stream: int, suffix: str) -> Path | None:
    """The file behind a stream: its own, or the one that Ray's thread writes."""
    own = f"-{os.getpid()}{suffix}"
    is_file = stat.S_ISREG(os.fstat(stream).st_mode)
    candidates = [_DESCRIPTORS / str(stream)] if is_file else list(_DESCRIPTORS.iterdir())
    for descriptor in candidates:
        with contextlib.suppress(OSError):  # it has just been closed
            if (path := descriptor.readlink()).name.endswith(own):
                return path
    return None
