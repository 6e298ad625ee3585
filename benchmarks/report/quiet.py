"""How busy other processes keep the machine, and a wait until they do not."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

import psutil

QUIET_CORES = 0.15
"""Other processes that use less than this are no disturbance."""
_LOOK_S = 0.5
_BUSY = ("user", "nice", "system", "irq", "softirq", "steal")
"""Times of the machine in which a core computes; those of guests are in user and nice."""


@dataclass(frozen=True, slots=True)
class CpuClock:
    """CPU seconds used so far."""

    wall_s: float
    """When."""
    all_s: float
    """By everything on this machine."""
    own_s: float
    """By this process and those below it."""

    @classmethod
    def now(cls) -> CpuClock:
        """Read the clocks."""
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
        """Cores that all other processes used from this reading until a later one."""
        used = (until.all_s - self.all_s) - (until.own_s - self.own_s)
        return max(used, 0.0) / (until.wall_s - self.wall_s)


def wait_until_quiet(deadline: float) -> None:
    """Return when others are quiet, or at ``deadline`` (monotonic seconds)."""
    while time.monotonic() < deadline:
        before = CpuClock.now()
        time.sleep(_LOOK_S)
        if before.others(CpuClock.now()) < QUIET_CORES:
            return
