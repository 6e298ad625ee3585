"""Requests that wait for something before the engine takes them: a grammar, or blocks of a peer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Protocol

from workers.engine_server import AddRequest


class Job(Protocol):
    """What requests wait for."""

    waiting: list[AddRequest]


class WaitingRequests(ABC):
    """Who waits, by what for. Subclasses begin and end the jobs. The engine's thread only."""

    num_waiting = 0
    """Choices of the requests that wait here; other threads may read it."""

    @abstractmethod
    def _all_jobs(self) -> Iterable[Job]:
        """Everything that is waited for."""

    def drop(self, request_id: str) -> None:
        """Forget a request that waits, if it does."""
        self._keep(lambda command: command.request.request_id != request_id)

    def drop_gateway(self, gateway: str) -> None:
        """Forget all requests of a gateway."""
        self._keep(lambda command: command.gateway != gateway)

    def owner(self, request_id: str) -> str | None:
        """The gateway of a request that waits here."""
        for job in self._all_jobs():
            for command in job.waiting:
                if command.request.request_id == request_id:
                    return command.gateway
        return None

    def _keep(self, is_wanted: Callable[[AddRequest], bool]) -> None:
        for job in self._all_jobs():
            job.waiting = [command for command in job.waiting if is_wanted(command)]
        self._count()

    def _count(self) -> None:
        """Whoever changes the jobs calls it."""
        self.num_waiting = sum(c.request.n for job in self._all_jobs() for c in job.waiting)
