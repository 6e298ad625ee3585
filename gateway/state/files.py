"""Access to files of the state folder: atomic writes, listing and reading."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from cluster.disk.files import new_file, sync_folder, write_all
from gateway.core.errors import StorageError, StorageFullError
from gateway.state.record import MAX_HEAD_BYTES, Head, decode_head

logger = logging.getLogger(__name__)

_TRIES = 3
"""Attempts to move a file to its folder, which another gateway may have removed as empty."""


@contextlib.contextmanager
def open_atomically(folder: Path, place: Path) -> Iterator[int]:
    """Yield the descriptor of a new file in ``folder``, which is renamed to ``place`` at the end of
    the ``with`` block, or removed after an error. Raises ``OSError``.
    """
    made = folder / uuid.uuid4().hex
    with new_file(made) as fd:
        yield fd
    try:
        _move(made, place)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(made)
        raise


def write_atomically(folder: Path, place: Path, content: bytes) -> None:
    """Write a file in ``folder`` and rename it to ``place``. Raises ``OSError``."""
    with open_atomically(folder, place) as fd:
        write_all(fd, content)


def check_disk(folder: Path, num_bytes: int) -> None:
    """Raise ``OSError`` if the disk has less than ``num_bytes`` bytes of free space."""
    disk = os.statvfs(folder)
    num_free = disk.f_bavail if os.geteuid() else disk.f_bfree
    if num_free * disk.f_frsize < num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def disk_time_s(folder: Path) -> float:
    """Return the Unix time in seconds by the file system's clock, which may be another host's."""
    os.utime(folder)
    return os.stat(folder).st_mtime


def list_files(folder: Path) -> list[tuple[os.DirEntry[str], os.stat_result]]:
    """Return the files in a folder; empty if the folder does not exist."""
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as listed:
        for entry in listed:
            with contextlib.suppress(FileNotFoundError):
                found.append((entry, entry.stat(follow_symlinks=False)))
    return found


def read_head(place: Path) -> Head:
    """Read the first line of a file. Raises ``OSError``, and ``StorageError`` if it is damaged."""
    with place.open("rb") as file:
        return decode_head(file.readline(MAX_HEAD_BYTES))


@contextlib.contextmanager
def as_storage_error() -> Iterator[None]:
    """Convert an ``OSError`` to a ``StorageError`` without paths; log the whole error."""
    try:
        yield
    except OSError as err:
        logger.error("the state folder cannot be used: %s", err)
        reason = os.strerror(err.errno) if err.errno else "unknown error"
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFullError(f"nothing more can be stored: {reason}") from err
        raise StorageError(f"the state folder cannot be used: {reason}") from err


def _move(made: Path, place: Path) -> None:
    """Rename a file to ``place``; create the folder and its parent folder if necessary."""
    for left in reversed(range(_TRIES)):
        for folder in (place.parent.parent, place.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
        try:
            made.replace(place)
        except FileNotFoundError:
            if not left:
                raise
        else:
            sync_folder(place.parent)
            return
