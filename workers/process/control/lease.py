"""A worker's lease and its check of the controller's term."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

from cluster.core.errors import SupersededError


class Lease:
    """Stops a worker that can neither reach the controller nor commit a step with others.

    Times are monotonic seconds; one thread only.

    An acknowledgement renews the lease from the time at which its *heartbeat was sent*: the
    controller counts its own limit from the later arrival of that heartbeat. An acknowledgement
    that waited in a socket while this process was stopped renews nothing.
    """

    def __init__(
        self,
        limit_s: float = math.inf,
        last_commit: Callable[[], float] = float,
        on_expired: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """The lease expires after ``limit_s`` without an acknowledgement and without a shared step.
        The limit is less than twice the detection limit. ``last_commit`` returns the time of the
        last committed step that other workers took part in. ``on_expired`` is called once, and
        again if the lease was renewed and expires again.
        """
        self._limit_s = limit_s
        self._last_commit = last_commit
        self._on_expired = on_expired
        self._sent_at: dict[int, float] = {}
        self._number = 0
        self._expired_at = -math.inf
        self.contact_at = 0.0
        """Time at which the newest acknowledged heartbeat was sent; at first, the connect time."""

    def record_heartbeat(self, now: float) -> int:
        """Record a heartbeat that is sent now, and return its number."""
        self._number += 1
        self._sent_at[self._number] = now
        return self._number

    def acknowledge(self, number: int) -> None:
        """Record the acknowledgement of a heartbeat, which covers all earlier ones."""
        if number in self._sent_at:
            self.contact_at = self._sent_at[number]
        self._sent_at = {n: at for n, at in self._sent_at.items() if n > number}

    def check(self, now: float) -> None:
        """Call ``on_expired`` once if the lease has expired."""
        renewed_at = max(self.contact_at, self._last_commit())
        silence, is_reported = now - renewed_at, self._expired_at - renewed_at > self._limit_s
        if silence > self._limit_s and not is_reported:
            self._expired_at = now
            self._on_expired(f"no contact with the controller and no step for {silence:.1f} s")


class TermGuard:
    """Accepts only the newest controller: the highest term, and one controller per term.

    Any thread.
    """

    def __init__(self) -> None:
        self.term = 0
        """Highest term seen."""
        self._controller = ""
        self._lock = threading.Lock()

    def check(self, term: int, controller: str) -> None:
        """Record a controller. Raises ``SupersededError`` if it is not the newest."""
        with self._lock:
            if term < self.term:
                raise SupersededError(f"a controller of the older term {term}, not {self.term}")
            if term == self.term and controller != self._controller:
                raise SupersededError(f"another controller of the same term {term}")
            self.term, self._controller = term, controller
