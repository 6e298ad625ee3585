"""Folders on local disk, each locked by one worker process at a time.

    DIR/3/lock          locked by the process that uses folder 3
    DIR/3/identity      readable description of the configuration that the items depend on
    DIR/3/TENANT/...    items; see ``workers.kv.tiers.disk``

A worker takes the folder of its rank if it is usable and not locked, else the next such folder. The
operating system releases the lock of a process that ends. Folders that no process has locked and
no rank needs are deleted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

SUFFIX: Final = ".kv"
"""Suffix of item files."""
UNFINISHED: Final = ".new"
"""Suffix of files that are being written."""
MAX_FOLDERS: Final = 1024
"""Number of folders that a worker tries to lock before it gives up."""
UNUSED_S: Final = 7 * 24 * 3600.0
"""Time since its last use after which an unlocked folder of another model is deleted."""
_LOCK: Final = "lock"
_IDENTITY: Final = "identity"


@dataclass(frozen=True, slots=True)
class ClaimedFolder:
    """A folder that this process has locked."""

    path: Path
    lock_file: int

    def describe(self, identity: str) -> None:
        """Write the identity of the items to a file. Raises ``OSError``."""
        (self.path / _IDENTITY).write_text(identity)

    def release(self) -> None:
        """Unlock the folder."""
        os.close(self.lock_file)


def claim_folder(base: Path, rank: int) -> ClaimedFolder:
    """Lock the folder of a rank, or the next usable one.

    Raises ``OSError`` if there is none: the error of the first unusable folder.
    """
    base.mkdir(parents=True, exist_ok=True)
    error: OSError | None = None
    for number in (rank, *(n for n in range(MAX_FOLDERS) if n != rank)):
        try:
            claimed = _lock(base / str(number), create=True)
        except OSError as err:
            if error is None:
                logger.warning("KV blocks are not kept in %s: %s", base / str(number), err)
            error = error or err
            continue
        if claimed is not None:
            return claimed
    if error is not None:
        raise error
    raise OSError(errno.EBUSY, f"other processes use all {MAX_FOLDERS} folders", str(base))


def delete_abandoned(
    base: Path, needed: Collection[int], model: str, now_s: float | None = None
) -> list[int]:
    """Delete folders that no process has locked and no rank needs; return their numbers.

    ``model``: prefix of the identity of this model's folders. Other clusters may use ``base`` too,
    so a folder of another model is deleted only ``UNUSED_S`` after its last claim or write.
    ``now_s``: seconds since the epoch. Raises ``OSError`` if ``base`` cannot be read.
    """
    now_s = time.time() if now_s is None else now_s
    numbers = sorted(int(name) for name in os.listdir(base) if name.isdecimal())
    deleted = []
    for number in numbers:
        if number in needed:
            continue
        folder = base / str(number)
        try:
            if _delete(folder, model, now_s):
                deleted.append(number)
        except OSError as err:
            logger.warning("could not delete the KV blocks in %s: %s", folder, err)
    return deleted


def item_entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield entries with the suffix of items in ``folder``; they may not be regular files.

    Unreadable tenant folders are skipped. Raises ``OSError`` if ``folder`` cannot be read.
    """
    with os.scandir(folder) as tenants:
        names = [entry.path for entry in tenants if entry.is_dir(follow_symlinks=False)]
    for tenant in names:
        try:
            with os.scandir(tenant) as entries:
                items = [entry for entry in entries if entry.name.endswith(SUFFIX)]
        except OSError as err:
            logger.warning("could not read KV blocks on disk: %s", err)
            continue
        yield from items


def _lock(folder: Path, *, create: bool) -> ClaimedFolder | None:
    """Lock a folder. None if another process has locked it. Raises ``OSError``."""
    while True:
        if create:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        lock_file = os.open(folder / _LOCK, flags, 0o600)
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_current(folder / _LOCK, lock_file):
                if create:
                    os.utime(lock_file)
                return ClaimedFolder(folder, lock_file)
        except BlockingIOError:
            os.close(lock_file)
            return None
        except OSError:
            os.close(lock_file)
            raise
        os.close(lock_file)  # another process has just deleted the folder


def _is_current(path: Path, lock_file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(lock_file))
    except FileNotFoundError:
        return False


def _delete(folder: Path, model: str, now_s: float) -> bool:
    """Delete a folder if it is abandoned, else return False. Raises ``OSError``."""
    try:
        claimed = _lock(folder, create=False)
    except FileNotFoundError:
        return False
    if claimed is None:
        return False
    try:
        with contextlib.suppress(FileNotFoundError):
            is_ours = (folder / _IDENTITY).read_text(errors="replace").startswith(model)
            if not is_ours and _last_use_s(folder) > now_s - UNUSED_S:
                return False
        _delete_files(folder)
    finally:
        claimed.release()
    logger.info("deleted the KV blocks in %s, which no worker needs", folder)
    return True


def _last_use_s(folder: Path) -> float:
    """Time of the last claim or write: the newest file, or change of a tenant's folder."""
    with os.scandir(folder) as entries:
        return max(entry.stat(follow_symlinks=False).st_mtime for entry in entries)


def _delete_files(folder: Path) -> None:
    """Delete items, then empty folders. Foreign files stay."""
    _unlink(entry.path for entry in item_entries(folder))
    _unlink(folder.glob(f"*{UNFINISHED}"))
    for tenant in folder.iterdir():
        if tenant.is_dir() and not tenant.is_symlink():
            _remove(tenant)
    _unlink((folder / _IDENTITY, folder / _LOCK))
    _remove(folder)


def _unlink(paths: Iterable[str | Path]) -> None:
    for path in paths:
        Path(path).unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    """Remove a folder if it is empty. Raises ``OSError`` for other failures."""
    try:
        folder.rmdir()
    except OSError as err:
        if err.errno != errno.ENOTEMPTY:
            raise
