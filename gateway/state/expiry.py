"""Removes expired files from the state folder.

A file is removed when its object has expired by the gateway's clock and has existed for its whole
lifetime by the file system's clock. A gateway with a wrong clock thus removes nothing too early.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from gateway.core.errors import StorageError
from gateway.state.files import list_files, read_head
from gateway.state.folder import NEW, WORK

logger = logging.getLogger(__name__)

_ABANDONED_S = 3600.0
"""Age in seconds at which a temporary file counts as abandoned by its writer."""


class Expiry:
    """Removes expired files. Raises ``OSError`` if a folder cannot be listed. Thread-safe.

    Args:
        folder: the state folder.
        ttl_s: lifetime in seconds of an object whose own lifetime cannot be read.
        clock: returns the Unix time in seconds.
        disk_clock: returns the Unix time in seconds by the file system's clock.
        on_removed: called with the path of each removed file of an object.
    """

    def __init__(
        self,
        folder: Path,
        ttl_s: float,
        clock: Callable[[], float],
        disk_clock: Callable[[], float],
        on_removed: Callable[[Path], None],
    ) -> None:
        self._folder = folder
        self._ttl_s = ttl_s
        self._clock = clock
        self._disk_clock = disk_clock
        self._on_removed = on_removed

    def sweep(self) -> int:
        """Remove expired and abandoned files, skipping unreadable folders; return their number."""
        num_removed = 0
        for kind in self._folder.iterdir():
            with _logged():
                if kind.name in (NEW, WORK) or not kind.is_dir():
                    continue
                for folder in kind.iterdir():
                    with _logged():
                        num_removed += self.sweep_folder(folder) if folder.is_dir() else 0
        with _logged():
            num_removed += self._sweep_temporary()
        return num_removed

    def sweep_folder(self, folder: Path) -> int:
        """Remove the expired objects of one kind and tenant; return the number of files."""
        now_s = self._clock()
        found = list_files(folder)
        late = [(folder / entry.name, stat) for entry, stat in found if stat.st_mtime <= now_s]
        disk_s = self._disk_clock() if late else 0.0
        num_removed = 0
        for place, stat in late:
            with _logged():
                if self._is_expired(place, stat, now_s, disk_s):
                    num_removed += self.remove(place)
        if num_removed == len(found):
            with contextlib.suppress(OSError):
                folder.rmdir()  # fails if a new object was stored
        return num_removed

    def remove(self, place: Path) -> bool:
        """Remove a file; return whether it existed. Raises ``OSError``."""
        self._on_removed(place)
        try:
            place.unlink()
        except FileNotFoundError:
            return False
        return True

    def _is_expired(self, place: Path, stat: os.stat_result, now_s: float, disk_s: float) -> bool:
        """Whether an object has expired by both clocks. The file's mtime may have been changed."""
        life_s = self._ttl_s  # lifetime of a damaged object
        with contextlib.suppress(StorageError):
            head = read_head(place)
            if head.expires_s > now_s:
                return False
            life_s = head.expires_s - head.created_s
        return disk_s - stat.st_ctime >= life_s

    def _sweep_temporary(self) -> int:
        """Remove killed writers' files by ctime, as their mtime may be a future expiry time."""
        num_removed = 0
        if not (found := list_files(self._folder / NEW)):
            return 0
        before_s = self._disk_clock() - _ABANDONED_S
        for entry, stat in found:
            with _logged():
                if stat.st_ctime < before_s:
                    (self._folder / NEW / entry.name).unlink(missing_ok=True)
                    num_removed += 1
        return num_removed


@contextlib.contextmanager
def _logged() -> Iterator[None]:
    """Log the error of one file or folder so that the others are still checked."""
    try:
        yield
    except OSError as err:
        logger.error("could not sweep a part of the state folder: %s", err)
