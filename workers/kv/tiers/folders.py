"""Folders on local disk, each of one worker process at a time.

    DIR/3/lock          locked by the process that has folder 3
    DIR/3/identity      what the keys and values in it depend on
    DIR/3/TENANT/...    items: see ``workers.kv.tiers.disk``

A worker takes the folder of its rank, if no other process has it, and else the next one that is
free; locks end with their processes. What an earlier process has left is of use to one of the same
identity, and is deleted by any other.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cluster.core.errors import ConfigError

logger = logging.getLogger(__name__)

SUFFIX: Final = ".kv"
"""Of files of items."""
UNFINISHED: Final = ".new"
"""Of files that are being written."""
MAX_FOLDERS: Final = 1024
"""Folders that are looked at for a free one."""


@dataclass(frozen=True, slots=True)
class ClaimedFolder:
    """A folder that no other process has."""

    path: Path
    lock_file: int

    def release(self) -> None:
        """Let others have it."""
        os.close(self.lock_file)


def claim_folder(base: Path, rank: int, identity: str) -> ClaimedFolder:
    """The folder of a rank, or another one that is free, with items of this identity only.

    Raises ``ConfigError``.
    """
    try:
        claimed = _first_free(base, [rank, *(n for n in range(MAX_FOLDERS) if n != rank)])
    except OSError as err:
        raise unusable(base, err) from err
    if claimed is None:
        rule = f"must have a free folder: other processes have {MAX_FOLDERS}"
        raise ConfigError("kv_disk_dir", str(base), rule)
    try:
        _keep_only(claimed.path, identity)
    except OSError as err:
        claimed.release()
        raise unusable(claimed.path, err) from err
    return claimed


def unusable(folder: Path, err: OSError) -> ConfigError:
    """The error of a folder that cannot be used."""
    return ConfigError("kv_disk_dir", str(folder), f"must be a folder that can be written: {err}")


def _first_free(base: Path, numbers: Iterable[int]) -> ClaimedFolder | None:
    for number in numbers:
        folder = base / str(number)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock_file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock_file)
        else:
            return ClaimedFolder(folder, lock_file)
    return None


def _keep_only(folder: Path, identity: str) -> None:
    """Delete what is unfinished and, unless its identity is this one, all items."""
    for path in folder.glob(f"*{UNFINISHED}"):
        path.unlink()
    known = folder / "identity"
    if known.is_file() and known.read_text(errors="replace") == identity:
        return
    items = list(folder.glob(f"*/*{SUFFIX}"))
    if items:
        logger.info("%d KV blocks of another model or configuration are deleted", len(items))
    for path in items:
        path.unlink()
    known.write_text(identity)
