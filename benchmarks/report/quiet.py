"""Measures the CPU use of other processes, and waits until it is low."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

import psutil

QUIET_CORES = 0.15
"""CPU cores; other processes that use less do not disturb a measurement."""
_LOOK_S = 0.5
_BUSY = ("user", "nice", "system", "irq", "softirq", "steal")
"""Kinds of CPU time in which a core computes; user and nice include guests."""


@dataclass(frozen=True, slots=True)
class CpuClock:
    """CPU seconds used until a point in time."""

    wall_s: float
    """Monotonic time of the reading."""
    all_s: float
    """CPU seconds of all processes of the machine."""
    own_s: float
    """CPU seconds of this process and its descendants."""

    @classmethod
    def now(cls) -> CpuClock:
        """Return the current readings."""
        times = psutil.cpu_times()
        busy = sum(getattr(times, name, 0.0) for name in _BUSY)
        own = 0.0
        me = psutil.Process()
        for process in (me, *me.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                used = process.cpu_times()
                own += used.user + used.system
        return cls(time.monotonic(), busy, own)

    def others(self, until: CpuClock) -> float:
        """CPU cores that other processes used between this reading and a later one."""
        used = (until.all_s - self.all_s) - (until.own_s - self.own_s)
        return max(used, 0.0) / (until.wall_s - self.wall_s)


def wait_until_quiet(deadline: float) -> None:
    """Wait until other processes are quiet, or until ``deadline`` (monotonic seconds)."""
    while time.monotonic() < deadline:
        before = CpuClock.now()
        time.sleep(_LOOK_S)
        if before.others(CpuClock.now()) < QUIET_CORES:
            return
