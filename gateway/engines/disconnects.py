"""Handles requests of lost connections, before it is known whether the worker is alive or dead."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from cluster.core.errors import NotReadyError, PoisonousRequestError
from gateway.core.replay import ReplayCause
from gateway.engines.engine_stream import StreamEnd
from gateway.engines.submission import Submission

logger = logging.getLogger(__name__)

_RESOLVE_LIMIT_S = 10.0
"""Longest time in seconds for which a request waits until a worker is known to be alive or dead."""


class DisconnectResolver:
    """Decides which requests of a lost connection continue, and which request killed its worker."""

    def __init__(self) -> None:
        self.suspects: list[tuple[Submission, str]] = []
        """Requests that may have killed their last worker, each with the error text. They fail once
        the worker is known to be dead, and continue if only the connection was lost."""
        self._unresolved: dict[str, float] = {}
        """Monotonic time of the loss of the connection, for each worker that may be alive."""
        self._is_stopping = False

    def stop(self) -> None:
        """From now on, fail requests that lose their worker. Called when the gateway shuts down."""
        self._is_stopping = True

    def note_end(self, worker: str) -> None:
        """Record that the stream to ``worker`` has ended although the worker may be alive."""
        self._unresolved.setdefault(worker, time.monotonic())

    def unresolved(self, now_s: float) -> list[str]:
        """Return the workers with a lost connection that are not yet known to be alive or dead.

        Workers whose connection was lost more than ``_RESOLVE_LIMIT_S`` ago are omitted.
        """
        return [w for w, at_s in self._unresolved.items() if now_s - at_s < _RESOLVE_LIMIT_S]

    def handle_lost_stream(
        self, worker: str, lost: Iterable[Submission], end: StreamEnd
    ) -> list[Submission]:
        """Decide about the requests of an ended stream; return the requests to assign again.

        A request that may have killed the worker becomes a suspect. During shutdown, all fail.
        """
        lost, continuing = list(lost), []
        has_suspect = any(entry.may_kill_on_receipt for entry in lost)
        for entry in lost:
            name = entry.request.request_id
            if self._is_stopping:
                reason = f"the gateway is shutting down ({end.reason})"
                entry.sink.fail(NotReadyError(reason, "not_ready", 1.0))
                continue
            logger.warning("request %s was lost with %s: %s", name, worker, end.reason)
            has_died_with = end.has_died and (entry.may_kill_on_receipt or not has_suspect)
            if (cause := entry.record_death() if has_died_with else None) is not None:
                self.suspects.append((entry, f"{cause}: {end.reason}"))
                continue
            entry.replay_cause = ReplayCause.LOST if end.has_died else ReplayCause.HANDED_BACK
            continuing.append(entry)
        return continuing

    def resolve(self, worker: str, has_died: bool) -> list[Submission]:
        """Decide about the suspects of a worker that is now known to be alive or dead.

        If the worker is alive, its suspects are returned and continue. If it is dead, they fail.
        """
        self._unresolved.pop(worker, None)
        suspects, self.suspects, continuing = self.suspects, [], []
        for entry, why in suspects:
            if entry.last_worker != worker:
                self.suspects.append((entry, why))
            elif self._is_stopping:
                entry.sink.fail(NotReadyError("the gateway is shutting down", "not_ready", 1.0))
            elif not has_died:
                continuing.append(entry)
            elif entry.is_waiting:
                entry.close()
                name = entry.request.request_id
                entry.sink.fail(PoisonousRequestError(f"request {name}: {why}"))
        return continuing
