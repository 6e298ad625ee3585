"""Disks that are nearly full: logs and timelines end there, while requests go on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from cluster.core.frames import LowDisk

LOW_BYTES = 64 * 1024 * 1024
LOW_PART = 20
"""A disk with fewer free bytes than ``LOW_BYTES``, and than one in ``LOW_PART``, is nearly full."""
LOOK_S = 2.0
"""Least time between two looks."""


class DiskWatch:
    """Looks at the disks of some folders, now and then; a look costs a system call a folder."""

    def __init__(self, folders: Callable[[], Iterable[Path | None]]) -> None:
        """``folders`` as they are at a look; None: there is no such folder."""
        self._folders = folders
        self._found: tuple[LowDisk, ...] = ()
        self._look_at = 0.0

    def low(self, now: float) -> tuple[LowDisk, ...]:
        """Those that are nearly full, as of the last look; ``now`` in monotonic seconds."""
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            self._found = low_disks(sorted({f for f in self._folders() if f is not None}))
        return self._found


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
