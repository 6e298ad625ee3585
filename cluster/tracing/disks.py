"""Disks that are nearly full: logs and timelines end there, while requests go on."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from cluster.core.frames import LowDisk

LOW_BYTES = 64 * 1024 * 1024
LOW_PART = 20
"""A disk is nearly full with less than 64 MiB and less than 5% (one part in 20) of free space."""
LOOK_S = 2.0
"""Least time between two looks."""


def low_disks(
    folders: Sequence[Path], look: Callable[[Path], os.statvfs_result] = os.statvfs
) -> tuple[LowDisk, ...]:
    """Folders on disks that are nearly full; one that cannot be looked at is left out."""
    found = []
    for folder in folders:
        try:
            disk = look(folder)
        except OSError:
            continue
        free_bytes, num_bytes = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
        if free_bytes < min(LOW_BYTES, num_bytes // LOW_PART):
            found.append(LowDisk(folder=str(folder), free_bytes=free_bytes))
    return tuple(found)


class DiskWatch:
    """Looks at the disks of some folders, now and then. One thread asks, and never waits.

    A look at a disk whose server has gone (NFS) may never end, so each one has a thread of its own,
    and the next one begins once it has ended.
    """

    def __init__(
        self,
        folders: Callable[[], Iterable[Path | None]],
        look: Callable[[Sequence[Path]], tuple[LowDisk, ...]] = low_disks,
    ) -> None:
        """``folders`` as they are at a look; None: there is no such folder."""
        self._folders = folders
        self._look = look
        self._found: tuple[LowDisk, ...] = ()
        self._look_at = 0.0
        self._looking: threading.Thread | None = None

    def low(self, now: float) -> tuple[LowDisk, ...]:
        """Those that are nearly full, as of the last look that has ended; it may begin another one.

        ``now`` is in monotonic seconds.
        """
        if now >= self._look_at and (self._looking is None or not self._looking.is_alive()):
            self._look_at = now + LOOK_S
            folders = sorted({folder for folder in self._folders() if folder is not None})
            self._looking = threading.Thread(
                target=self._look_once, args=(folders,), name="disks", daemon=True
            )
            with contextlib.suppress(RuntimeError):  # the process has as many threads as it may
                self._looking.start()
        return self._found

    def _look_once(self, folders: Sequence[Path]) -> None:
        self._found = self._look(folders)
