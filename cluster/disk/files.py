"""Writes of files that stay consistent if the disk fills or fails, or the process is killed.

``RecordFile`` appends whole records. ``new_file`` and ``replace_file`` write a temporary file and
rename it: readers see the old content or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class RecordFile:
    """Appends records to an open file, each completely or not at all.

    After an error the file is truncated to its complete records, at the latest before the next
    record is written.

    Args:
        fd: descriptor of a file that was opened for appending (``O_APPEND``).
        num_bytes: bytes of the records already in the file.
    """

    def __init__(self, fd: int, num_bytes: int = 0) -> None:
        self._fd = fd
        self._is_torn = False
        self.num_bytes = num_bytes
        """Size in bytes of all complete records in the file."""

    def append(self, record: bytes) -> None:
        """Append a record. After an ``OSError``, only the earlier records count."""
        if self._is_torn:
            self.truncate(self.num_bytes)
        self._is_torn = True
        try:
            write_all(self._fd, record)
        except OSError:
            with contextlib.suppress(OSError):
                self.truncate(self.num_bytes)
            raise
        self.num_bytes += len(record)
        self._is_torn = False

    def truncate(self, num_bytes: int) -> None:
        """Truncate the file to its first ``num_bytes`` bytes. Raises ``OSError``."""
        self.num_bytes, self._is_torn = num_bytes, True
        os.ftruncate(self._fd, num_bytes)
        self._is_torn = False


def write_all(fd: int, content: bytes) -> None:
    """Write all of ``content`` to a file descriptor. Raises ``OSError``, possibly after a part was
    written."""
    left = memoryview(content)
    while left:
        num_written = os.write(fd, left)
        if not num_written:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        left = left[num_written:]


@contextlib.contextmanager
def new_file(path: Path, mode: int = 0o600) -> Iterator[int]:
    """Create a file and yield its descriptor; the file is synced at the end of the ``with`` block.

    Raises ``OSError``, also if the file already exists. After any other error the file does not
    exist.
    """
    fd = os.open(path, _NEW, mode)
    try:
        try:
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def replace_file(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Replace a file's content atomically, or create the file.

    A symbolic link stays a link; a pipe or a device is written to directly. ``mode`` applies to a
    new file; an existing file keeps its mode. Raises ``OSError``.
    """
    path = Path(os.path.realpath(path))
    try:
        known = os.stat(path).st_mode
    except FileNotFoundError:
        known = None
    if known is not None and not stat.S_ISREG(known):
        path.write_bytes(content)
        return
    draft = path.with_name(f".{uuid.uuid4().hex}.tmp")
    with new_file(draft, mode) as fd:
        if known is not None:
            os.fchmod(fd, stat.S_IMODE(known))
        write_all(fd, content)
    try:
        os.replace(draft, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Sync a folder to its disk, so that its new file names survive a crash. Raises ``OSError``."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
