"""Which disks are nearly full, and how often that is looked at."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from benchmarks.harness.stalls import wait_until
from cluster.core.frames import LowDisk
from cluster.tracing.disks import CHECK_INTERVAL_S, LOW_BYTES, DiskMonitor, low_disks

LOGS = Path("/logs")
WAIT_S = 60.0


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


LOW = LowDisk(folder="/logs", free_bytes=3)


def test_disks_are_looked_at_now_and_then() -> None:
    looks: queue.SimpleQueue[Sequence[Path]] = queue.SimpleQueue()

    def look(folders: Sequence[Path]) -> tuple[LowDisk, ...]:
        looks.put(folders)
        return (LOW,)

    watch = DiskMonitor(lambda: [None, LOGS, LOGS], look)
    watch.low(10.0)
    assert looks.get(timeout=WAIT_S) == [LOGS]
    wait_until(lambda: watch.low(10.1) == (LOW,), "the end of the look")
    assert looks.empty(), "it was too early for another one"
    wait_until(lambda: watch.low(10.0 + CHECK_INTERVAL_S) and not looks.empty(), "another look")


def test_nobody_waits_for_a_disk_that_hangs() -> None:
    is_back, looks = threading.Event(), []

    def look(folders: Sequence[Path]) -> tuple[LowDisk, ...]:
        looks.append(folders)
        assert is_back.wait(WAIT_S)
        return (LOW,)

    watch = DiskMonitor(lambda: [LOGS], look)
    for number in range(20):
        assert watch.low(number * CHECK_INTERVAL_S) == ()
    is_back.set()
    assert len(looks) <= 1, "the first look has not ended"
    wait_until(lambda: watch.low(20 * CHECK_INTERVAL_S) == (LOW,), "the end of the look")
