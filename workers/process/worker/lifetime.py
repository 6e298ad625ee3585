"""How far the process of a worker is from its end.

    ACTIVE ──▶ LEAVING ──▶ ENDING
       └──────────────────────▲

It never goes back. The data thread, calls of Ray and a signal to end move it on.
"""

from __future__ import annotations

import threading
from enum import Enum

from cluster.core.states import Transitions, next_state

STOP_TIMEOUT_S = 5.0
"""Longest wait for the end of the data thread."""
_CALL_LIMIT_S = 2.0
"""Time in which the controller ends the process of a worker that it has told to end."""


class Life(Enum):
    """What the process is about to do. The value is for people."""

    ACTIVE = "active"
    LEAVING = "asks for a drain"
    """It serves until the controller ends it."""
    ENDING = "ends"
    """The data thread runs no further iteration."""


_NEXT: Transitions[Life] = {
    Life.ACTIVE: {Life.LEAVING, Life.ENDING},
    Life.LEAVING: {Life.ENDING},
    Life.ENDING: {Life.ENDING},
}


class Lifetime:
    """See the module. All methods may be called on any thread."""

    def __init__(self) -> None:
        self._life = Life.ACTIVE
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    @property
    def is_ending(self) -> bool:
        """The process ends: its data thread stops, and a failure is no news."""
        return self._life is Life.ENDING

    def leave(self) -> bool:
        """The worker is about to ask for a drain; False if it has asked before, or ends."""
        with self._lock:
            if self._life is not Life.ACTIVE:
                return False
            self._life = next_state(self._life, Life.LEAVING, _NEXT)
            return True

    def end(self) -> None:
        """The process ends; again is nothing."""
        with self._lock:
            self._life = next_state(self._life, Life.ENDING, _NEXT)

    def stop(self) -> None:
        """The same, and the caller ends the process."""
        self.end()
        self._stopped.set()

    def is_stopped_in_time(self) -> bool:
        """Wait for a call of ``stop``; False if the controller that said so must have been lost."""
        return self._stopped.wait(_CALL_LIMIT_S)
