"""The calls of this replica that have not ended, by the names that clients know them by."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.core.errors import ExpertMeshError, RequestAbortedError
from gateway.generation.output_queue import OutputQueue


class RunningCalls:
    """Names to calls. Several calls may have the same name: clients choose ``x-request-id``."""

    def __init__(self) -> None:
        self._queues: dict[str, set[OutputQueue]] = {}
        self._names: dict[OutputQueue, set[str]] = {}

    def __len__(self) -> int:
        return len(self._names)

    def add(self, name: str, queue: OutputQueue) -> None:
        """Give a call one more name."""
        self._queues.setdefault(name, set()).add(queue)
        self._names.setdefault(queue, set()).add(name)

    def remove(self, queue: OutputQueue) -> None:
        for name in self._names.pop(queue, ()):
            self._queues[name].discard(queue)
            if not self._queues[name]:
                del self._queues[name]

    def abort(self, names: Iterable[str]) -> list[str]:
        """End the calls of these names; returns the names that were found."""
        found = [name for name in dict.fromkeys(names) if name in self._queues]
        for name in found:
            for queue in self._queues[name]:
                queue.fail(RequestAbortedError("the request was ended by an operator"))
        return found

    def fail(self, error: ExpertMeshError) -> None:
        for queue in self._names:
            queue.fail(error)
