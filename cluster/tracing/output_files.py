"""Rotates the files to which standard output and standard error of this process are written.

The launcher has one file for both streams; Ray gives each of its processes two. If Ray rotates them
(``RAY_ROTATION_MAX_BYTES``), it inserts a pipe and a thread of the same process, and the contents
of the pipe are lost when the process crashes or is killed. Therefore this module redirects the
streams to their files.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

MAX_BYTES = 16 * 1024 * 1024
"""Size at which a new file is started; the previous one is kept."""
LIMIT_VARIABLE = "RAY_ROTATION_MAX_BYTES"
"""Ray's own variable for another size; 0 or less disables rotation."""
_OPEN = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
"""Every user may write to a folder of Ray's in ``/tmp``, so symbolic links are not followed."""
_STREAMS = {1: ".out", 2: ".err"}
"""Descriptors of the streams, and Ray's suffixes of their files."""
_DESCRIPTORS = Path("/proc/self/fd")


class OutputFiles:
    """The files of this process's streams. Not thread-safe."""

    def __init__(self) -> None:
        self._streams: dict[Path, tuple[int, ...]] = {}
        self._max_bytes: int | None = MAX_BYTES

    @property
    def folder(self) -> Path | None:
        """Folder of the files; None if the streams are not known files."""
        return next((path.parent for path in self._streams), None)

    @property
    def error_file(self) -> Path | None:
        """The file of standard error; None if it is not a known file."""
        return next((path for path, streams in self._streams.items() if 2 in streams), None)

    def redirect_streams(self) -> None:
        """Redirect the streams to the files that Ray opened for this process, if any."""
        self._max_bytes = _limit(os.environ.get(LIMIT_VARIABLE, ""))
        for stream, suffix in _STREAMS.items():
            with contextlib.suppress(OSError):
                if (path := _file_of(stream, suffix)) is not None:
                    _redirect(stream, path)
                    self._streams[path] = (stream,)

    def add_file(self, path: Path) -> None:
        """Rotate the launcher's file ``path`` if both streams are written to it."""
        with contextlib.suppress(OSError):
            if all(os.path.samestat(os.fstat(stream), path.stat()) for stream in _STREAMS):
                self._streams[path] = tuple(_STREAMS)

    def rotate(self) -> None:
        """Start new files in place of files that have reached their size.

        On a full disk the old ones continue. Only log records trigger the check: a file that other
        code fills grows until the next record.
        """
        if self._max_bytes is None:
            return
        for path, streams in self._streams.items():
            with contextlib.suppress(OSError):
                if os.fstat(streams[0]).st_size >= self._max_bytes:
                    _start_new_file(streams, path)


def rotated_path(path: Path) -> Path:
    """Return the name of a file's previous version; Ray's files follow Ray's scheme."""
    if path.suffix in _STREAMS.values():
        return path.with_name(f"{path.stem}.1{path.suffix}")
    return path.with_name(f"{path.name}.1")


def _limit(text: str) -> int | None:
    """Size limit in bytes from the value of ``LIMIT_VARIABLE``; None: no limit, as in Ray.

    A value that is not a number counts as unset: Ray's own processes do not start with it.
    """
    try:
        num_bytes = int(text)
    except ValueError:
        return MAX_BYTES
    return num_bytes if num_bytes > 0 else None


def _start_new_file(streams: tuple[int, ...], path: Path) -> None:
    """Start a new file. Raises ``OSError``; the streams then still write to the file at its path.

    The new file is created before the old one is renamed.
    """
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    file = os.open(new, _OPEN | os.O_EXCL, 0o644)
    try:
        path.replace(rotated_path(path))
        try:
            new.replace(path)
        except OSError:
            rotated_path(path).replace(path)
            raise
        for stream in streams:
            os.dup2(file, stream)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise
    finally:
        os.close(file)


def _redirect(stream: int, path: Path) -> None:
    file = os.open(path, _OPEN, 0o644)
    try:
        os.dup2(file, stream)
    finally:
        os.close(file)


def _file_of(stream: int, suffix: str) -> Path | None:
    """Return the file of a stream: its own, or the one that Ray's thread writes.

    Raises ``OSError`` if the stream is closed or there is no ``/proc``.
    """
    own = f"-{os.getpid()}{suffix}"
    is_file = stat.S_ISREG(os.fstat(stream).st_mode)
    candidates = [_DESCRIPTORS / str(stream)] if is_file else list(_DESCRIPTORS.iterdir())
    for descriptor in candidates:
        with contextlib.suppress(OSError):  # closed in the meantime
            if (path := descriptor.readlink()).name.endswith(own):
                return path
    return None
