"""Folders on local disk, each of one worker process at a time.

    DIR/3/lock          locked by the process that has folder 3
    DIR/3/identity      what the keys and values in it depend on, for people
    DIR/3/TENANT/...    items: see ``workers.kv.tiers.disk``

A worker takes the folder of its rank if it can be used and no other process has it, and else the
next one. Locks end with their processes. A folder that no process has and no rank needs is deleted.
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
"""Of files of items."""
UNFINISHED: Final = ".new"
"""Of files that are being written."""
MAX_FOLDERS: Final = 1024
"""Folders that are looked at for a free one."""
UNUSED_S: Final = 7 * 24 * 3600.0
"""Time without a process after which a folder of another model is deleted."""
_LOCK: Final = "lock"
_IDENTITY: Final = "identity"


@dataclass(frozen=True, slots=True)
class ClaimedFolder:
    """A folder that no other process has."""

    path: Path
    lock_file: int

    def describe(self, identity: str) -> None:
        """Write what the items in it depend on. Raises ``OSError``."""
        (self.path / _IDENTITY).write_text(identity)

    def release(self) -> None:
        """Let others have it."""
        os.close(self.lock_file)


def claim_folder(base: Path, rank: int) -> ClaimedFolder:
    """The folder of a rank, or the next one that can be used.

    Raises ``OSError`` where there is none, with the error of the first one that cannot be used.
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
    raise OSError(errno.EBUSY, f"other processes have all {MAX_FOLDERS} folders", str(base))


def delete_abandoned(
    base: Path, needed: Collection[int], model: str, now_s: float | None = None
) -> list[int]:
    """Delete folders that no process has and no rank needs; returns their numbers.

    ``model``: how the identity of folders of this model begins. Other clusters may use ``base``
    too: a folder of another model is deleted only once no process has had it for ``UNUSED_S``.
    ``now_s`` are seconds since the epoch. Raises ``OSError`` where ``base`` cannot be read.
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
            logger.warning("the KV blocks in %s cannot be deleted: %s", folder, err)
    return deleted


def item_entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Entries of ``folder`` that have an item's name, whatever they are.

    Raises ``OSError`` where the folder cannot be read; a tenant's folder that cannot be is left
    out.
    """
    with os.scandir(folder) as tenants:
        names = [entry.path for entry in tenants if entry.is_dir(follow_symlinks=False)]
    for tenant in names:
        try:
            with os.scandir(tenant) as entries:
                items = [entry for entry in entries if entry.name.endswith(SUFFIX)]
        except OSError as err:
            logger.warning("KV blocks on disk cannot be read: %s", err)
            continue
        yield from items


def _lock(folder: Path, *, create: bool) -> ClaimedFolder | None:
    """Lock a folder; None: another process has it. Raises ``OSError``."""
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
        os.close(lock_file)  # another process has deleted the folder meanwhile


def _is_current(path: Path, lock_file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(lock_file))
    except FileNotFoundError:
        return False


def _delete(folder: Path, model: str, now_s: float) -> bool:
    """Delete an abandoned folder; False where it is not one. Raises ``OSError``."""
    try:
        claimed = _lock(folder, create=False)
    except FileNotFoundError:
        return False
    if claimed is None:
        return False
    try:
        with contextlib.suppress(FileNotFoundError):
            is_ours = (folder / _IDENTITY).read_text(errors="replace").startswith(model)
            if not is_ours and os.fstat(claimed.lock_file).st_mtime > now_s - UNUSED_S:
                return False
        _delete_files(folder)
    finally:
        claimed.release()
    logger.info("the KV blocks in %s are deleted: no worker needs them", folder)
    return True


def _delete_files(folder: Path) -> None:
    """Delete items, and the folders that are empty then: files of others stay."""
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
    """Remove a folder if it is empty. Raises ``OSError`` for any other reason."""
    try:
        folder.rmdir()
    except OSError as err:
        if err.errno != errno.ENOTEMPTY:
            raise
