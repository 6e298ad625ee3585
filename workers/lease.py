"""What binds a worker to its controller: the lease, and the term of the one that it follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.errors import ProtocolError


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """A worker that can neither reach the controller nor commit a step must stop by itself."""

    limit_s: float
    """Longest time without both; below twice the detection limit."""
    last_commit: Callable[[], float]
    """Monotonic time of the last committed step."""
    on_expired: Callable[[str], None]
    """Called once when the lease has run out, on the client's thread."""


class LeaseClock:
    """When the lease was last renewed. Times are monotonic seconds; one thread only.

    An acknowledgement renews it from the moment at which the *heartbeat was sent*: the controller
    counts its own limit from that heartbeat's arrival, which is later. So an acknowledgement that
    waited in a socket while this process was stopped renews nothing.
    """

    def __init__(self, lease: Lease | None) -> None:
        """Without a lease nothing ever expires."""
        self._lease = lease
        self._sent_at: dict[int, float] = {}
        self._number = 0
        self._is_expired = False
        self.contact_at = 0.0
        """When the newest acknowledged heartbeat was sent."""

    def begin(self, now: float) -> None:
        """The controller has been reached for the first time."""
        self.contact_at = now

    def beat(self, now: float) -> int:
        """A heartbeat is sent now; returns its number."""
        self._number += 1
        self._sent_at[self._number] = now
        return self._number

    def acknowledged(self, number: int) -> None:
        """The controller has answered that heartbeat, and with it all earlier ones."""
        if number in self._sent_at:
            self.contact_at = self._sent_at[number]
            self._is_expired = False
        self._sent_at = {n: at for n, at in self._sent_at.items() if n > number}

    def check(self, now: float) -> None:
        """Say once that the lease has run out."""
        lease = self._lease
        if lease is None or self._is_expired:
            return
        silence = now - max(self.contact_at, lease.last_commit())
        if silence > lease.limit_s:
            self._is_expired = True
            lease.on_expired(f"no contact with the controller and no step for {silence:.1f} s")


class TermGuard:
    """Lets only the newest controller give orders: the highest term, and one controller a term."""

    def __init__(self) -> None:
        self.term = 0
        """Highest term seen."""
        self._controller = ""

    def check(self, term: int, controller: str) -> None:
        """Take note of a controller. Raises ``ProtocolError`` when it is not to be followed."""
        if term < self.term:
            raise ProtocolError(f"a controller of the older term {term}")
        if term == self.term and controller != self._controller:
            raise ProtocolError(f"another controller of the same term {term}")
        self.term, self._controller = term, controller
