"""Phases of a worker process.

    ACTIVE ──▶ LEAVING ──▶ ENDING
       └──────────────────────▲

A process never returns to an earlier phase. The data thread, Ray calls and SIGTERM change it.
"""

from __future__ import annotations

import threading
from enum import Enum

from cluster.core.states import Transitions, next_state

STOP_TIMEOUT_S = 5.0
"""Longest wait for the data thread to end, in seconds."""
_CALL_LIMIT_S = 2.0
"""Time in which the controller calls ``stop`` after it has commanded a worker to end."""


class ProcessPhase(Enum):
    """Phase of a worker process. The values are texts for logs and errors."""

    ACTIVE = "active"
    LEAVING = "asks for a drain"
    """The worker has asked for a drain, and serves until the controller ends it."""
    ENDING = "ends"
    """The data thread runs no further iteration."""


_NEXT: Transitions[ProcessPhase] = {
    ProcessPhase.ACTIVE: {ProcessPhase.LEAVING, ProcessPhase.ENDING},
    ProcessPhase.LEAVING: {ProcessPhase.ENDING},
    ProcessPhase.ENDING: {ProcessPhase.ENDING},
}


class Lifetime:
    """The phase of a worker process. Any thread may call the methods."""

    def __init__(self) -> None:
        self._phase = ProcessPhase.ACTIVE
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    @property
    def is_ending(self) -> bool:
        """Whether the process is ending: the data thread stops, and failures are not reported."""
        return self._phase is ProcessPhase.ENDING

    def begin_leaving(self) -> bool:
        """Mark the worker as leaving; False if it already is leaving or ending."""
        with self._lock:
            if self._phase is not ProcessPhase.ACTIVE:
                return False
            self._phase = next_state(self._phase, ProcessPhase.LEAVING, _NEXT)
            return True

    def end(self) -> None:
        """Mark the process as ending. Idempotent."""
        with self._lock:
            self._phase = next_state(self._phase, ProcessPhase.ENDING, _NEXT)

    def stop(self) -> None:
        """Mark the process as ending and stopped; the caller ends the process."""
        self.end()
        self._stopped.set()

    def is_stopped_in_time(self) -> bool:
        """Wait until ``stop`` is called; False after the limit: the controller is probably lost."""
        return self._stopped.wait(_CALL_LIMIT_S)
