"""Which disks are nearly full, and how often that is looked at."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cluster.core.frames import LowDisk
from cluster.tracing import disks
from cluster.tracing.disks import LOOK_S, LOW_BYTES, DiskWatch, low_disks

LOGS = Path("/logs")


def disk(num_bytes: int, free_bytes: int) -> Callable[[Path], os.statvfs_result]:
    """A look that finds a disk with blocks of a byte, some of them for root alone."""
    return lambda folder: os.statvfs_result(
        (1, 1, num_bytes, free_bytes + 7, free_bytes, 0, 0, 0, 0, 255)
    )


@pytest.mark.parametrize(
    ("num_bytes", "free_bytes", "is_low"),
    [
        (1 << 40, LOW_BYTES, False),
        (1 << 40, LOW_BYTES - 1, True),
        (1000, 50, False),
        (1000, 49, True),
        (1000, 0, True),
    ],
)
def test_a_disk_is_low_below_a_size_and_a_part(
    num_bytes: int, free_bytes: int, is_low: bool
) -> None:
    found = low_disks([LOGS], disk(num_bytes, free_bytes))
    assert found == ((LowDisk(folder="/logs", free_bytes=free_bytes),) if is_low else ())


def test_a_folder_that_is_gone_is_left_out(tmp_path: Path) -> None:
    assert low_disks([tmp_path / "gone"]) == ()


def test_disks_are_looked_at_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Sequence[Path]] = []

    def look(folders: Sequence[Path]) -> tuple[LowDisk, ...]:
        looks.append(folders)
        return ()

    monkeypatch.setattr(disks, "low_disks", look)
    watch = DiskWatch(lambda: [None, LOGS, LOGS])
    for now in (10.0, 10.1, 10.0 + LOOK_S, 10.1 + LOOK_S):
        watch.low(now)
    assert looks == [[LOGS]] * 2
