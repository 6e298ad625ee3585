"""How long this machine did not run us: a thread beats, and every late beat is a stall.

A test that waits has a limit for a machine of its own. ``Limit`` does not count the time in which
the machine stood still, nor the share that went to other work: with 8 processes that want to
run on 2 cores, three quarters. The report of a failed test says how long that was.
"""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

BEAT_S = 0.05
"""Time between two beats."""
STALL_S = 0.5
"""A gap between two beats that is longer counts as a stall."""
_POLL_S = 0.02


def crowding() -> float:
    """Processes that want to run now for each core; at least 1, and 1 where that is unknown."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return 1.0
    found = (int(line.split()[1]) for line in lines if line.startswith("procs_running "))
    return max(1.0, next(found, 0) / (os.cpu_count() or 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """The time between two beats, in seconds of ``time.monotonic``."""

    begin: float
    end: float
    lost: float
    """Share of the gap in which other processes ran."""

    @property
    def is_stall(self) -> bool:
        """No process ran."""
        return self.end - self.begin > STALL_S

    def within(self, since: float) -> float:
        """Length of the part after a time, seconds."""
        return max(0.0, self.end - max(self.begin, since))


class Heartbeat:
    """Records gaps between beats; ``beat`` is called by a thread that sleeps in between."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        crowding: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.clock = clock
        self._crowding = crowding
        self._last = clock()
        self._gaps: list[Gap] = []

    def beat(self) -> None:
        """Record the gap since the last beat if the beat is late or a part of the gap was lost."""
        gap = self._gap_until(self.clock())
        if gap.lost or gap.end - gap.begin > 2 * BEAT_S:
            self._gaps.append(gap)
        self._last = gap.end

    def stalled_s(self, since: float) -> float:
        """Seconds after ``since`` in which the machine stood still or ran others."""
        return sum(gap.lost * gap.within(since) for gap in self._after(since))

    def longest_gap_s(self, since: float) -> float:
        """Longest time without a beat after ``since``, of those above two beats; stalls or not."""
        return max(gap.within(since) for gap in self._after(since))

    def describe(self, since: float) -> str:
        """One line about what was lost after ``since``; empty if that was next to nothing."""
        gaps = self._after(since)
        stalls = [gap.within(since) for gap in gaps if gap.is_stall]
        shared_s = sum(gap.lost * gap.within(since) for gap in gaps if not gap.is_stall)
        words = []
        if stalls:
            words.append(
                f"the machine stood still for {sum(stalls):.1f} s in {len(stalls)} stalls, "
                f"{max(stalls):.1f} s at the longest"
            )
        if shared_s > STALL_S:
            words.append(f"other work took {shared_s:.1f} s")
        return "; ".join(words)

    def run(self) -> None:
        """Beat until the process ends."""
        while True:
            time.sleep(BEAT_S)
            self.beat()

    def _gap_until(self, now: float) -> Gap:
        is_stall = now - self._last > STALL_S
        lost = 1.0 if is_stall else 1.0 - 1.0 / self._crowding()
        return Gap(begin=self._last, end=now, lost=lost)

    def _after(self, since: float) -> list[Gap]:
        """Gaps that ended later, the one under way included."""
        first = bisect_right(self._gaps, since, key=lambda gap: gap.end)
        return [*self._gaps[first:], self._gap_until(self.clock())]


@cache
def heartbeat() -> Heartbeat:
    """The heartbeat of this process; the first call starts its thread."""
    found = Heartbeat(crowding=crowding)
    threading.Thread(target=found.run, name="heartbeat", daemon=True).start()
    return found


class Limit:
    """A limit of time that begins now; time that was not ours does not count."""

    def __init__(self, limit_s: float, heart: Heartbeat | None = None) -> None:
        self._heart = heart or heartbeat()
        self._limit_s = limit_s
        self._since = self._heart.clock()

    def is_over(self) -> bool:
        """Whether we had the machine for longer than the limit."""
        used_s = self._heart.clock() - self._since
        return used_s > self._limit_s and used_s - self.stalled_s() > self._limit_s

    def stalled_s(self) -> float:
        """Seconds since the beginning that were not ours."""
        return self._heart.stalled_s(self._since)


def wait_until(is_so: Callable[[], object], what: str = "a state", limit_s: float = 120.0) -> None:
    """Look until it is so. Raises ``AssertionError`` beyond a ``Limit``."""
    limit = Limit(limit_s)
    while not is_so():
        assert not limit.is_over(), f"gave up waiting for {what}"
        time.sleep(_POLL_S)
