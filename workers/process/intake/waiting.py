"""Requests that wait for other threads: for a grammar, or for KV blocks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeVar

from msgspec import structs

from cluster.core.errors import RequestError
from workers.process.intake.commands import AddRequest
from workers.requests.request import Request

Result = TypeVar("Result")


@dataclass(kw_only=True, slots=True, eq=False)
class Job:
    """Work in another thread, and the requests that wait for it."""

    waiting: list[AddRequest] = field(default_factory=list)
    deadline_s: float = math.inf
    """Time on the clock at which the requests stop waiting."""


class WaitingRequests(ABC):
    """Requests by the job they wait for. Methods belong to the engine's thread.

    Args:
        wake: called, by any thread, when a job has ended.
        clock: monotonic seconds.
        name: of the threads.
        max_threads: jobs that run at the same time.
    """

    reason: ClassVar[str] = "kv"
    """What its requests wait for, in metrics."""

    def __init__(
        self, wake: Callable[[], None], clock: Callable[[], float], name: str, max_threads: int
    ) -> None:
        self.by_adapter: Counter[str] = Counter()
        """Choices of the requests that wait here and not in the engine, by the key of their
        adapter. Never changed but replaced: other threads may read it."""
        self._wake = wake
        self._clock = clock
        self._executor = ThreadPoolExecutor(max_threads, thread_name_prefix=name)

    @property
    def num_waiting(self) -> int:
        """Choices of the requests that wait here and not in the engine; other threads may ask."""
        return self.by_adapter.total()

    @property
    def adapters(self) -> frozenset[str]:
        """Keys of the adapters of these requests; other threads may ask."""
        return frozenset(key for key in self.by_adapter if key)

    @abstractmethod
    def _all_jobs(self) -> Iterable[Job]:
        """Jobs that have not been taken."""

    def wait_s(self, at_most_s: float) -> float:
        """Seconds until a deadline, if that is sooner than ``at_most_s``."""
        deadline_s = min((job.deadline_s for job in self._all_jobs()), default=math.inf)
        return min(at_most_s, max(0.0, deadline_s - self._clock()))

    def drop(self, request_id: str, choices: Sequence[int] = ()) -> None:
        """Forget a request if it waits here, or some of its choices."""
        if not choices:
            self._keep(lambda command: command.request.request_id != request_id)
            return
        for job in self._all_jobs():
            for place, command in enumerate(job.waiting):
                if (request := command.request).request_id == request_id:
                    closed = tuple(sorted({*request.closed_choices, *choices}))
                    request = structs.replace(request, closed_choices=closed)
                    job.waiting[place] = replace(command, request=request)

    def drop_gateway(self, gateway: str) -> None:
        self._keep(lambda command: command.gateway != gateway)

    def owner(self, request_id: str) -> str | None:
        """The gateway of a request that waits here."""
        found = self._command(request_id)
        return None if found is None else found.gateway

    def attempt(self, request_id: str) -> int:
        """The attempt of a request that waits here; -1 for any other one."""
        found = self._command(request_id)
        return -1 if found is None else found.request.attempt

    def _command(self, request_id: str) -> AddRequest | None:
        commands = (command for job in self._all_jobs() for command in job.waiting)
        return next((c for c in commands if c.request.request_id == request_id), None)

    def close(self) -> None:
        """Start no further job; jobs that run end by themselves."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _start(self, work: Callable[[], Result]) -> Future[Result]:
        future = self._executor.submit(work)
        future.add_done_callback(lambda ended: self._wake())
        return future

    def _keep(self, is_wanted: Callable[[AddRequest], bool]) -> None:
        for job in self._all_jobs():
            job.waiting = [command for command in job.waiting if is_wanted(command)]
        self._count()

    def _count(self) -> None:
        """Must follow every change of the jobs."""
        found: Counter[str] = Counter()
        for job in self._all_jobs():
            for command in (c for c in job.waiting if not c.is_queued):
                found[command.request.adapter] += command.request.n
        self.by_adapter = found


def stale_error(request: Request, intakes: Iterable[WaitingRequests]) -> RequestError | None:
    """Why a request that arrives is refused: a newer attempt waits; None if none does."""
    name = request.request_id
    newest = max((waiting.attempt(name) for waiting in intakes), default=-1)
    if newest <= request.attempt:
        return None
    return RequestError(f"request {name} is here already, with attempt {newest}", "request_id")


def count_waiting(stats: dict[str, float], intakes: Iterable[WaitingRequests]) -> Counter[str]:
    """Add the choices that wait to the gauges of a worker; returns them by key of their adapter."""
    by_adapter: Counter[str] = Counter()
    for waiting in intakes:
        by_adapter += waiting.by_adapter
        stats["num_requests_waiting"] += waiting.num_waiting
        name = f'num_requests_waiting_by_reason{{reason="{waiting.reason}"}}'
        stats[name] = stats.get(name, 0.0) + waiting.num_waiting
    return by_adapter
