"""Detects nearly full disks, on which logs and timelines stop while requests continue."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from cluster.core.frames import LowDisk

LOW_BYTES = 64 * 1024 * 1024
LOW_PART = 20
"""Divisor of a disk's size: a disk is nearly full if less than 1/20 of it and less than
``LOW_BYTES`` are free.
"""
CHECK_INTERVAL_S = 2.0
"""Shortest time between the starts of two disk checks, in seconds."""


def low_disks(
    folders: Sequence[Path], look: Callable[[Path], os.statvfs_result] = os.statvfs
) -> tuple[LowDisk, ...]:
    """Return the folders on nearly full disks; folders that cannot be checked are omitted."""
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


class DiskMonitor:
    """Checks the disks of some folders periodically without blocking the calling thread.

    A check may hang if the disk's server is lost (NFS). Therefore each check runs in its own
    thread, and the next check starts after the thread has ended.
    """

    def __init__(
        self,
        folders: Callable[[], Iterable[Path | None]],
        look: Callable[[Sequence[Path]], tuple[LowDisk, ...]] = low_disks,
    ) -> None:
        """``folders`` returns the folders to check; None entries are skipped.

        Called before each check.
        """
        self._folders = folders
        self._check = look
        self._low: tuple[LowDisk, ...] = ()
        self._next_check_s = 0.0
        self._check_thread: threading.Thread | None = None

    def low(self, now: float) -> tuple[LowDisk, ...]:
        """Return the nearly full disks of the last finished check; start a further check if due.

        ``now`` is in monotonic seconds.
        """
        if now >= self._next_check_s and (
            self._check_thread is None or not self._check_thread.is_alive()
        ):
            self._next_check_s = now + CHECK_INTERVAL_S
            folders = sorted({folder for folder in self._folders() if folder is not None})
            self._check_thread = threading.Thread(
                target=self._check_once, args=(folders,), name="disks", daemon=True
            )
            with contextlib.suppress(RuntimeError):  # the process has reached its limit of threads
                self._check_thread.start()
        return self._low

    def _check_once(self, folders: Sequence[Path]) -> None:
        self._low = self._check(folders)
