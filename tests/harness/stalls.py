"""How long this machine stood still: a thread beats, and every late beat is a stall.

A test that waits has a limit for a machine that runs. ``Limit`` does not count the time in which
the machine stood still, and the report of a failed test says how long that was.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

BEAT_S = 0.05
"""Time between two beats."""
STALL_S = 0.5
"""A gap between two beats that is longer counts as a stall."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stall:
    """One gap between two beats, in seconds of ``time.monotonic``."""

    begin: float
    end: float

    def within(self, since: float, until: float) -> float:
        """Length of the part that lies between two times, seconds."""
        return max(0.0, min(self.end, until) - max(self.begin, since))


class Heartbeat:
    """Records gaps between beats; ``beat`` is called by a thread that sleeps in between."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._last = clock()
        self._stalls: list[Stall] = []

    def beat(self) -> None:
        """Record the gap since the last beat when it was too long."""
        now = self.clock()
        if now - self._last > STALL_S:
            self._stalls.append(Stall(begin=self._last, end=now))
        self._last = now

    def stalls(self, since: float) -> list[Stall]:
        """Stalls that ended after ``since``, the one under way included."""
        now, last = self.clock(), self._last
        current = [Stall(begin=last, end=now)] if now - last > STALL_S else []
        return [stall for stall in [*self._stalls, *current] if stall.end > since]

    def stalled_s(self, since: float) -> float:
        """Seconds after ``since`` in which the machine stood still."""
        return sum(stall.within(since, self.clock()) for stall in self.stalls(since))

    def describe(self, since: float) -> str:
        """One line about the stalls after ``since``; empty if there were none."""
        lengths = [stall.within(since, self.clock()) for stall in self.stalls(since)]
        if not lengths:
            return ""
        return (
            f"the machine stood still for {sum(lengths):.1f} s in {len(lengths)} stalls, "
            f"{max(lengths):.1f} s at the longest"
        )

    def run(self) -> None:
        """Beat until the process ends."""
        while True:
            time.sleep(BEAT_S)
            self.beat()


@cache
def heartbeat() -> Heartbeat:
    """The heartbeat of this process; the first call starts its thread."""
    found = Heartbeat()
    threading.Thread(target=found.run, name="heartbeat", daemon=True).start()
    return found


class Limit:
    """A limit of time that begins now; time in which the machine stood still does not count."""

    def __init__(self, limit_s: float, heart: Heartbeat | None = None) -> None:
        self._heart = heart or heartbeat()
        self._limit_s = limit_s
        self._since = self._heart.clock()

    def is_over(self) -> bool:
        """Whether the machine ran for longer than the limit."""
        used_s = self._heart.clock() - self._since
        return used_s > self._limit_s and used_s - self.stalled_s() > self._limit_s

    def stalled_s(self) -> float:
        """Seconds since the beginning in which the machine stood still."""
        return self._heart.stalled_s(self._since)
