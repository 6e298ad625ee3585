"""Storage usage of tenants, and its limits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from gateway.core.errors import KeyFullError
from gateway.state.files import list_files

_FRESH_S = 1.0


@dataclass(slots=True)
class _FolderUsage:
    """Files of one kind that a tenant has stored."""

    counted_s: float
    """Unix time of the count."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Size in bytes of each file, by id, oldest first."""

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes.values())


class StorageQuota:
    """Counts the files in tenants' folders at most once a second. Thread-safe.

    Args:
        max_objects: maximum number of files in one folder.
        max_bytes: maximum total size of the files in one folder.
        clock: returns the Unix time in seconds.
    """

    def __init__(self, max_objects: int, max_bytes: int, clock: Callable[[], float]) -> None:
        self._max_objects = max_objects
        self.max_bytes = max_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._usages: dict[Path, _FolderUsage] = {}
        self._reserved: dict[Path, int] = {}
        """Sizes of files that are being written, which a count of the folder would miss."""

    def reserve(self, place: Path, size: int, drops_oldest: bool) -> list[Path]:
        """Count a file that is about to be written, in place of a file with the same name.

        ``release`` must be called when the file is written, or will not be written.

        Args:
            place: path of the file.
            size: bytes of the file.
            drops_oldest: whether the oldest files are dropped if a limit is reached.

        Returns:
            Files to remove after this file is written. They are no longer counted.

        Raises:
            KeyFullError: the file would exceed a limit.
        """
        if size > self.max_bytes:
            raise KeyFullError(
                f"an object of {size} bytes is above the limit of {self.max_bytes} for a key"
            )
        with self._lock:
            sizes = dict(self._usage(place.parent).sizes)
            sizes.pop(place.name, None)
            num_bytes, dropped = sum(sizes.values()), []
            for oldest in list(sizes) if drops_oldest else ():
                if len(sizes) < self._max_objects and num_bytes + size <= self.max_bytes:
                    break
                dropped.append(place.parent / oldest)
                num_bytes -= sizes.pop(oldest)
            what = place.parent.parent.name
            if len(sizes) >= self._max_objects:
                raise KeyFullError(
                    f"this key has stored {len(sizes)} {what}, the limit is "
                    f"{self._max_objects}: delete some, or wait until they expire"
                )
            if num_bytes + size > self.max_bytes:
                raise KeyFullError(
                    f"this key has stored {num_bytes} bytes of {what}, {size} more are above "
                    f"the limit of {self.max_bytes}: delete some, or wait until they expire"
                )
            sizes[place.name] = size
            self._usages[place.parent].sizes = sizes
            self._reserved[place] = size
        return dropped

    def release(self, place: Path) -> None:
        """End a reservation; from now on, the file is counted if it exists."""
        with self._lock:
            self._reserved.pop(place, None)

    def remove(self, place: Path) -> None:
        """Record that a file was removed."""
        with self._lock:
            if (usage := self._usages.get(place.parent)) is not None:
                usage.sizes.pop(place.name, None)

    def forget(self, folder: Path) -> None:
        """Discard a wrong count of a folder; its files are counted again at the next use."""
        with self._lock:
            self._usages.pop(folder, None)

    def _usage(self, folder: Path) -> _FolderUsage:
        now_s = self._clock()
        fresh = {f: u for f, u in self._usages.items() if 0 <= now_s - u.counted_s < _FRESH_S}
        self._usages = fresh
        if folder not in fresh:
            sizes = {entry.name: stat.st_size for entry, stat in list_files(folder)}
            sizes |= {
                one.name: size for one, size in self._reserved.items() if one.parent == folder
            }
            fresh[folder] = _FolderUsage(now_s, dict(sorted(sizes.items())))
        return fresh[folder]
