"""State of the data thread that heartbeats report: progress, waits, and stalled time.

A step may take longer than the detection limit (a long prefill on a cold cache), so progress is
also counted within steps, at each exchange with the experts. If one exchange takes even longer, the
CPU time of the data thread counts as progress, up to a time that grows with the rows.

The loop also iterates while it waits for a step, so iterations show that the thread is alive, but
not that steps advance. ``stalled_s`` ignores them.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable

ROW_LIMIT_S = 0.25
"""Seconds per row that a step may compute between two exchanges (large experts, slow CPU)."""
_MIN_CPU_S = 0.001
"""Minimum CPU time between two heartbeats for which the data thread counts as computing."""


def thread_cpu_clock() -> Callable[[], float]:
    """Return a clock of the calling thread's CPU time. Any thread may read the clock, which raises
    ``OSError`` after the measured thread has ended."""
    clock = time.pthread_getcpuclockid(threading.get_ident())
    return lambda: time.clock_gettime(clock)


class Activity:
    """Counters of one data thread, read by the control thread."""

    def __init__(self) -> None:
        self._iterations = 0
        """Number of iterations of the data thread's loop."""
        self._advances = 0
        """Number of exchanges and commits of steps."""
        self.native_progress = ctypes.c_int64()
        """Number of exchanges that native code has served."""
        self.is_waiting = False
        """Whether the data thread waits for a peer during a step (``with activity:``)."""
        self.is_idle = True
        """Whether the data thread has no work."""
        self.rows = 0
        """Number of rows of the running step; 0 outside a step."""
        self.wants_rows = False
        """Whether this rank has rows and waits for a step to run them."""
        self.stalled_s: float | None = None
        """Seconds for which a running or awaited step had not advanced at the last heartbeat; None
        without such a step."""
        self.cpu_s: Callable[[], float] = float
        """CPU clock of the data thread, which the thread sets at its start; zero before."""
        self._cpu_seen_s = 0.0
        self._seen = -1
        self._seen_at = 0.0
        self._computed = 0
        self._work, self._worked_at = 0, 0.0

    @property
    def progress(self) -> int:
        """Counter of loop iterations, of exchanges outside native code, and of commits."""
        return self._iterations + self._advances

    def begin_iteration(self) -> None:
        """Begin an iteration of the loop, outside a step."""
        self._iterations += 1
        self.rows = 0

    def advance(self) -> None:
        """Count progress of a step, or of work outside steps."""
        self._advances += 1

    def observe(self, now: float) -> int:
        """Return all progress, including native exchanges and CPU use; update ``stalled_s``."""
        cpu_s = self._cpu_seen_s
        with contextlib.suppress(OSError):  # the thread has ended
            cpu_s = self.cpu_s()
        computes = cpu_s - self._cpu_seen_s >= _MIN_CPU_S
        self._cpu_seen_s = cpu_s
        progress = self.progress + self.native_progress.value
        if progress != self._seen:
            self._seen, self._seen_at = progress, now
        elif computes and now - self._seen_at <= self.rows * ROW_LIMIT_S:
            self._computed += 1
        self._observe_steps(now)
        return progress + self._computed

    def _observe_steps(self, now: float) -> None:
        work = self._advances + self.native_progress.value + self._computed
        was_busy, is_busy = self.stalled_s is not None, self.wants_rows or self.rows > 0
        if work != self._work or not was_busy:
            self._work, self._worked_at = work, now
        self.stalled_s = now - self._worked_at if is_busy else None

    def __enter__(self) -> None:
        self.is_waiting = True

    def __exit__(self, *error: object) -> None:
        self.is_waiting = False
        self._advances += 1
