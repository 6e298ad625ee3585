"""Files of the state folder: written aside, renamed into their places, counted and removed."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from gateway.core.errors import StorageError, StorageFullError
from gateway.state.record import MAX_HEAD_BYTES, decode_head

logger = logging.getLogger(__name__)

_TRIES = 3
"""Moves of a file to its folder, which another gateway may just have removed as empty."""


def write_aside(folder: Path, raw: bytes) -> Path:
    """A new file with this content in ``folder``, safe on the disk."""
    made = folder / uuid.uuid4().hex
    try:
        handle = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        made.unlink(missing_ok=True)
        raise
    return made


def move(made: Path, place: Path) -> None:
    """Rename a file into its place, whose folder and the one above it may be missing."""
    for left in reversed(range(_TRIES)):
        for folder in (place.parent.parent, place.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
        try:
            made.replace(place)
        except FileNotFoundError:
            if not left:
                raise
        else:
            _sync(place.parent)
            return


def entries(folder: Path) -> list[tuple[os.DirEntry[str], os.stat_result]]:
    """Files in a folder, which may be missing; others may remove them meanwhile."""
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as listed:
        for entry in listed:
            with contextlib.suppress(FileNotFoundError):
                found.append((entry, entry.stat(follow_symlinks=False)))
    return found


def has_expired(place: Path, now_s: float) -> bool:
    """By its first line: tools that copy folders may set other modification times."""
    try:
        with place.open("rb") as file:
            return decode_head(file.readline(MAX_HEAD_BYTES)).expires_s <= now_s
    except FileNotFoundError:
        return False
    except StorageError:
        return True  # it has no use


@contextlib.contextmanager
def as_storage_error() -> Iterator[None]:
    """What the file system refuses, without its paths; the log has the whole error."""
    try:
        yield
    except OSError as err:
        logger.error("the state folder cannot be used: %s", err)
        reason = os.strerror(err.errno) if err.errno else "unknown error"
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFullError(f"nothing more can be stored: {reason}") from err
        raise StorageError(f"the state folder cannot be used: {reason}") from err


def _sync(folder: Path) -> None:
    """Make a rename safe on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
