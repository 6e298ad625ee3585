"""Measures how long processes waited for a processor, to tell starved workers from dead ones.

A thread that is ready to run, but gets no processor, waits in a run queue. The kernel counts this
time in ``/proc/PID/task/TID/schedstat`` (Linux, Documentation/scheduler/sched-stats.rst, second
field, nanoseconds), but not time in which a thread is stopped or waits for anything else. Time that
the host of a virtual machine took from a processor is in ``/proc/stat`` (``steal``).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path

_STEAL_FIELD = 8
_NS_PER_S = 1e9


class ProcessorWaits:
    """Measures how long processes waited for a processor between two calls of ``take``."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._ticks_per_s = os.sysconf("SC_CLK_TCK")
        self._waited: dict[int, dict[str, int]] = {}
        self._stolen: dict[str, int] = {}

    def take(self, pids: Collection[int]) -> dict[int, float]:
        """Return, by process id, for how many seconds the process waited since the previous call.

        The wait of a process is the longest wait of one of its threads, or the time that the host
        of the virtual machine took, if longer. It is 0 if the previous call did not contain the
        process id or the kernel has no counts.
        """
        waited = {pid: self._waits(pid) for pid in pids}
        stolen = self._steal() if pids else {}
        stolen_s = _largest_growth(self._stolen, stolen) / self._ticks_per_s
        found = {}
        for pid, now in waited.items():
            before = self._waited.get(pid)
            wait_s = 0.0 if before is None else _largest_growth(before, now) / _NS_PER_S
            found[pid] = max(wait_s, stolen_s if before is not None and now else 0.0)
        self._waited, self._stolen = waited, stolen
        return found

    def _waits(self, pid: int) -> dict[str, int]:
        """Return each thread's wait in nanoseconds by thread id; empty if the process has ended."""
        found = {}
        with contextlib.suppress(OSError):
            for thread in (self._proc / str(pid) / "task").iterdir():
                with contextlib.suppress(OSError, ValueError, IndexError):
                    found[thread.name] = int((thread / "schedstat").read_text().split()[1])
        return found

    def _steal(self) -> dict[str, int]:
        """Return, by processor, the clock ticks that the host of the virtual machine took."""
        found = {}
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in (self._proc / "stat").read_text().splitlines():
                name, *fields = line.split()
                if name.startswith("cpu") and name != "cpu":
                    found[name] = int(fields[_STEAL_FIELD - 1])
        return found


def _largest_growth(before: Mapping[str, int], now: Mapping[str, int]) -> int:
    return max((now[key] - before[key] for key in now.keys() & before.keys()), default=0)
