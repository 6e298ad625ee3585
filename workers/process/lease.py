"""The bond between a worker and its controller: the lease, and the controller's term."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from cluster.core.errors import SupersededError


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """When a worker stops that can neither reach the controller nor commit a step."""

    limit_s: float
    """Longest time without controller and commit; below twice the detection limit."""
    last_commit: Callable[[], float]
    """Monotonic time of the last committed step."""
    on_expired: Callable[[str], None]
    """Called once when the lease runs out, on the client's thread."""


class LeaseClock:
    """The last renewal of the lease. Times are monotonic seconds; one thread only.

    An acknowledgement renews the lease from the time its *heartbeat was sent*: the controller
    counts its own limit from the arrival of that heartbeat, which is later. An acknowledgement that
    waited in a socket while this process was stopped renews nothing.
    """

    def __init__(self, lease: Lease | None) -> None:
        """Without a lease nothing ever expires."""
        self._lease = lease
        self._sent_at: dict[int, float] = {}
        self._number = 0
        self._is_expired = False
        self.contact_at = 0.0
        """Time at which the newest acknowledged heartbeat was sent."""

    def begin(self, now: float) -> None:
        """The controller has answered for the first time."""
        self.contact_at = now

    def beat(self, now: float) -> int:
        """The number of a heartbeat that is sent now."""
        self._number += 1
        self._sent_at[self._number] = now
        return self._number

    def acknowledged(self, number: int) -> None:
        """The controller has acknowledged a heartbeat, and with it all earlier ones."""
        if number in self._sent_at:
            self.contact_at = self._sent_at[number]
            self._is_expired = False
        self._sent_at = {n: at for n, at in self._sent_at.items() if n > number}

    def check(self, now: float) -> None:
        """Call ``on_expired`` once if the lease has run out."""
        lease = self._lease
        if lease is None or self._is_expired:
            return
        silence = now - max(self.contact_at, lease.last_commit())
        if silence > lease.limit_s:
            self._is_expired = True
            lease.on_expired(f"no contact with the controller and no step for {silence:.1f} s")


class TermGuard:
    """Accepts only the newest controller: the highest term, and one controller a term.

    Any thread.
    """

    def __init__(self) -> None:
        self.term = 0
        """Highest term seen."""
        self._controller = ""
        self._lock = threading.Lock()

    def check(self, term: int, controller: str) -> None:
        """Note a controller. Raises ``SupersededError`` when it is not the newest."""
        with self._lock:
            if term < self.term:
                raise SupersededError(f"a controller of the older term {term}")
            if term == self.term and controller != self._controller:
                raise SupersededError(f"another controller of the same term {term}")
            self.term, self._controller = term, controller
