"""Rotates the files to which standard output and standard error of this process are written.

The launcher has one file for both streams; Ray gives each of its processes two files. If Ray
rotates the files (``RAY_ROTATION_MAX_BYTES``), it inserts a pipe and a thread of the same process,
and the contents of the pipe are lost when the process crashes or is killed. Therefore this module
redirects the streams to their files.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

MAX_BYTES = 16 * 1024 * 1024
"""Size in bytes at which a new log file is started; the previous file is kept."""
LIMIT_VARIABLE = "RAY_ROTATION_MAX_BYTES"
"""Ray's environment variable for the size at which log files rotate; 0 or less: no rotation."""
_OPEN = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
"""Flags to open a log file. Symbolic links are not followed, because every user may write to Ray's
folder in ``/tmp``.
"""
_STREAMS = {1: ".out", 2: ".err"}
"""Ray's suffix of the log file of each output stream, by file descriptor."""
_DESCRIPTORS = Path("/proc/self/fd")


class OutputFiles:
    """Files of standard output and standard error of this process. Not thread-safe."""

    def __init__(self) -> None:
        self._streams: dict[Path, tuple[int, ...]] = {}
        self._max_bytes: int | None = MAX_BYTES

    @property
    def folder(self) -> Path | None:
        """Folder of the output files; None if the streams go to no file of Ray or the launcher."""
        return next((path.parent for path in self._streams), None)

    @property
    def error_file(self) -> Path | None:
        """File of standard error; None if standard error goes to no file of Ray or the launcher."""
        return next((path for path, streams in self._streams.items() if 2 in streams), None)

    def redirect_streams(self) -> None:
        """Redirect standard output and error to the files that Ray opened for them, if any."""
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
        """Start a new file in place of each file that has reached its size limit.

        On a full disk the old files continue. Only log records trigger the check: a file that other
        code fills grows until the next record.
        """
        if self._max_bytes is None:
            return
        for path, streams in self._streams.items():
            with contextlib.suppress(OSError):
                if os.fstat(streams[0]).st_size >= self._max_bytes:
                    _start_new_file(streams, path)


def rotated_path(path: Path) -> Path:
    """Return the path of a log file's previous version; Ray's files follow Ray's naming scheme."""
    if path.suffix in _STREAMS.values():
        return path.with_name(f"{path.stem}.1{path.suffix}")
    return path.with_name(f"{path.name}.1")


def _limit(text: str) -> int | None:
    """Return the size limit in bytes from the value of ``LIMIT_VARIABLE``; None: no limit.

    A value that is not a number counts as unset: Ray's own processes do not start with such a
    value.
    """
    try:
        num_bytes = int(text)
    except ValueError:
        return MAX_BYTES
    return num_bytes if num_bytes > 0 else None


def _start_new_file(streams: tuple[int, ...], path: Path) -> None:
    """Start a new file at ``path`` and redirect the ``streams`` to it.

    The new file is created before the old file is renamed. Raises ``OSError``; the streams then
    still write to the old file.
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
    """Return the path of the file that Ray opened for a stream, or None if there is none.

    The stream is this file or, if Ray rotates files, a pipe to a thread that writes the file.
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
