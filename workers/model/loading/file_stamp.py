"""Evidence that a file of a checkpoint has not changed since it was first opened."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from cluster.core.errors import CheckpointError

_NUM_SAMPLES, _SAMPLE_BYTES = 32, 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class FileStamp:
    """Size, modification time and hash of samples of a file, to detect that the file changed."""

    num_bytes: int
    modified_ns: int
    """Modification time on this host in nanoseconds since 1970; not part of the checkpoint's id."""
    samples: str
    """Hash (hex) of samples that are spread over the whole file."""

    @classmethod
    def of(cls, file: Path) -> FileStamp:
        """Return the stamp of a file. Raises ``CheckpointError`` if the file cannot be read."""
        digest = hashlib.sha256()
        try:
            with file.open("rb") as data:
                known = os.fstat(data.fileno())
                for number in range(_NUM_SAMPLES + 1):
                    last = max(known.st_size - _SAMPLE_BYTES, 0)
                    data.seek(last * number // _NUM_SAMPLES)
                    digest.update(data.read(_SAMPLE_BYTES))
        except OSError as err:
            raise CheckpointError(f"{file.name} cannot be read: {err.strerror}") from err
        return cls(
            num_bytes=known.st_size, modified_ns=known.st_mtime_ns, samples=digest.hexdigest()
        )


def size_and_change(file: Path) -> tuple[int, int]:
    """Return the size of a file in bytes and its inode change time (ctime) in nanoseconds.

    A restored backup sets the modification time back, but cannot set the inode change time. Raises
    ``CheckpointError`` if the file cannot be read.
    """
    try:
        found = file.stat()
    except OSError as err:
        raise CheckpointError(f"{file.name} cannot be read: {err.strerror}") from err
    return found.st_size, found.st_ctime_ns
