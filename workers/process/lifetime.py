"""How far the process of a worker is from its end.

    ACTIVE ──▶ LEAVING ──▶ ENDING
       └──────────────────────▲

It never goes back. The data thread, calls of Ray and a signal to end move it on.
"""

from __future__ import annotations

import threading
from enum import Enum

from cluster.core.states import Transitions, next_state


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
