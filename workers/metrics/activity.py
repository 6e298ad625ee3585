"""What a heartbeat reports of the data thread: its progress, and for whom it waits.

A step may take longer than the detection limit (a long prefill on a cold cache), so progress is
also counted within steps, at each exchange with the experts. One exchange may take longer, too:
in a step, CPU time of the data thread counts as progress, for a time that grows with the rows.

The loop turns also while it waits for a step, so its turns show that the thread lives, and not that
steps advance: ``stalled_s`` leaves them out.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable

ROW_LIMIT_S = 0.25
"""Time between two exchanges that each row of a step may take: large experts on a slow CPU."""
_MIN_CPU_S = 0.001
"""CPU time between two heartbeats from which on the data thread computes."""


def thread_cpu_clock() -> Callable[[], float]:
    """The CPU time of this thread, for any thread to ask. Raises ``OSError`` after its end."""
    clock = time.pthread_getcpuclockid(threading.get_ident())
    return lambda: time.clock_gettime(clock)


class Activity:
    """Counters of one data thread, read by the control thread."""

    def __init__(self) -> None:
        self._turns = 0
        """Iterations of the loop."""
        self._advances = 0
        """Exchanges of steps, and commits."""
        self.native_progress = ctypes.c_int64()
        """The same, of exchanges that native code has served."""
        self.is_waiting = False
        """The data thread waits for a peer within a step (``with activity:``)."""
        self.is_idle = True
        """The data thread has no work."""
        self.rows = 0
        """Rows of the step under way; 0 outside a step."""
        self.wants_rows = False
        """The data thread waits for a step with rows of its own."""
        self.stalled_s: float | None = None
        """Time for which a step that is wanted or under way has not advanced, as of the last
        heartbeat; None without such a step."""
        self.cpu_s: Callable[[], float] = float
        """The CPU time of the data thread, which sets it when it begins; zero before."""
        self._cpu_seen_s = 0.0
        self._seen = -1
        self._seen_at = 0.0
        self._computed = 0
        self._work, self._worked_at = 0, 0.0

    @property
    def progress(self) -> int:
        """Grows with every iteration of the loop, every exchange of a step and every commit."""
        return self._turns + self._advances

    def begin_iteration(self) -> None:
        """An iteration of the loop begins, outside a step."""
        self._turns += 1
        self.rows = 0

    def advance(self) -> None:
        """A step has advanced, or what the data thread does outside of steps."""
        self._advances += 1

    def observe(self, now: float) -> int:
        """The progress for a heartbeat, which counts computing, too. Control thread."""
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
