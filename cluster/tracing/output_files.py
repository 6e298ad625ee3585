"""The files behind this process's standard output and error: they are rotated.

The launcher has one for both streams. Ray gives every process of its own two files. Where it is to
rotate them (``RAY_ROTATION_MAX_BYTES``) it puts a pipe and a thread of the same process before
them, and what is in the pipe is lost when the process is killed or crashes. So here the streams are
redirected to their files again.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

MAX_BYTES = 16 * 1024 * 1024
"""Size at which a new file begins; the one before is kept."""
LIMIT_VARIABLE = "RAY_ROTATION_MAX_BYTES"
"""Ray's own variable: it sets another size; 0, or less, is no rotation."""
_OPEN = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
"""Everybody may write to a folder of Ray's in ``/tmp``: a link there must lead nowhere."""
_STREAMS = {1: ".out", 2: ".err"}
"""Descriptors of the streams, and how Ray ends the names of their files."""
_DESCRIPTORS = Path("/proc/self/fd")


class OutputFiles:
    """The files of this process's streams. One thread at a time may call it."""

    def __init__(self) -> None:
        self._streams: dict[Path, tuple[int, ...]] = {}
        self._max_bytes: int | None = MAX_BYTES

    @property
    def folder(self) -> Path | None:
        """Where they are; None where the streams are no files that it knows."""
        return next((path.parent for path in self._streams), None)

    @property
    def of_errors(self) -> Path | None:
        """The file of standard error; None where it is none that it knows."""
        return next((path for path, streams in self._streams.items() if 2 in streams), None)

    def redirect_streams(self) -> None:
        """Redirect the streams to the files that Ray has opened for this process, if any."""
        self._max_bytes = _limit(os.environ.get(LIMIT_VARIABLE, ""))
        for stream, suffix in _STREAMS.items():
            with contextlib.suppress(OSError):
                if (path := _file_of(stream, suffix)) is not None:
                    _redirect(stream, path)
                    self._streams[path] = (stream,)

    def take(self, path: Path) -> None:
        """Rotate this file of ours, if both streams lead there."""
        with contextlib.suppress(OSError):
            if all(os.path.samestat(os.fstat(stream), path.stat()) for stream in _STREAMS):
                self._streams[path] = tuple(_STREAMS)

    def rotate(self) -> None:
        """Start new files in place of those that have reached their size.

        On a full disk the old ones go on. A log record is what causes a look at both files: one
        that other code fills grows until then.
        """
        if self._max_bytes is None:
            return
        for path, streams in self._streams.items():
            with contextlib.suppress(OSError):
                if os.fstat(streams[0]).st_size >= self._max_bytes:
                    _start_new_file(streams, path)


def previous(path: Path) -> Path:
    """Name of the file before one; of a file of Ray's, as Ray gives it."""
    if path.suffix in _STREAMS.values():
        return path.with_name(f"{path.stem}.1{path.suffix}")
    return path.with_name(f"{path.name}.1")


def _limit(text: str) -> int | None:
    """Bytes of a file, by the value of ``LIMIT_VARIABLE``; None: no limit, by Ray's rule.

    What is no number counts as unset: Ray's own processes refuse to start with it.
    """
    try:
        num_bytes = int(text)
    except ValueError:
        return MAX_BYTES
    return num_bytes if num_bytes > 0 else None


def _start_new_file(streams: tuple[int, ...], path: Path) -> None:
    """Raises ``OSError``: the streams write to their file, at its path.

    The new file is made before the old one is renamed.
    """
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    file = os.open(new, _OPEN | os.O_EXCL, 0o644)
    try:
        path.replace(previous(path))
        try:
            new.replace(path)
        except OSError:
            previous(path).replace(path)
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
    """The file behind a stream: its own, or the one that Ray's thread writes.

    Raises ``OSError`` where the stream is closed, or where there is no ``/proc``.
    """
    own = f"-{os.getpid()}{suffix}"
    is_file = stat.S_ISREG(os.fstat(stream).st_mode)
    candidates = [_DESCRIPTORS / str(stream)] if is_file else list(_DESCRIPTORS.iterdir())
    for descriptor in candidates:
        with contextlib.suppress(OSError):  # it has just been closed
            if (path := descriptor.readlink()).name.endswith(own):
                return path
    return None
