"""Requests that wait for a job in another thread: a compilation or a transfer of blocks."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from workers.process.intake.intake_request import IntakeRequest

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(kw_only=True, slots=True, eq=False)
class Job:
    """Work in another thread, and the requests that wait for it."""

    waiting: list[IntakeRequest] = field(default_factory=list)
    deadline_s: float = math.inf
    """Time on the clock at which the requests stop waiting."""


class WaitingRequests(ABC):
    """Keeps each request with the job that it waits for. Engine's thread only.

    Args:
        wake: called, on any thread, when a job has ended.
        clock: monotonic seconds.
        name: prefix of the thread names.
        max_threads: maximum number of concurrent jobs.
    """

    def __init__(
        self, wake: Callable[[], None], clock: Callable[[], float], name: str, max_threads: int
    ) -> None:
        self._wake = wake
        self._clock = clock
        self._executor = ThreadPoolExecutor(max_threads, thread_name_prefix=name)

    @property
    def names(self) -> list[str]:
        """Ids of the requests that wait."""
        return [waiting.name for job in self._all_jobs() for waiting in job.waiting]

    @abstractmethod
    def _all_jobs(self) -> Iterable[Job]:
        """Jobs that have not been taken."""

    def wait_s(self, at_most_s: float) -> float:
        """Seconds until the next deadline, at most ``at_most_s``."""
        deadline_s = min((job.deadline_s for job in self._all_jobs()), default=math.inf)
        return min(at_most_s, max(0.0, deadline_s - self._clock()))

    def drop(self, name: str) -> None:
        """Remove a request that waits here."""
        self._keep(lambda waiting: waiting.name != name)

    def drop_gateway(self, gateway: str) -> None:
        """Remove the requests of a gateway."""
        self._keep(lambda waiting: waiting.gateway != gateway)

    def close(self) -> None:
        """Start no further jobs; running jobs end by themselves."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _start(self, work: Callable[[], Result]) -> Future[Result]:
        """Run ``work`` in a thread. The future is cancelled if no thread can be started."""
        future = Future[Result]()
        future.add_done_callback(lambda ended: self._wake())
        try:
            self._executor.submit(_run, future, work)
        except RuntimeError as err:  # the process has reached its limit of threads
            logger.warning("a transfer or compilation is skipped: %s", err)
            future.cancel()  # if another thread takes the work nevertheless, it does nothing
        return future

    def _keep(self, is_wanted: Callable[[IntakeRequest], bool]) -> None:
        for job in self._all_jobs():
            job.waiting = [waiting for waiting in job.waiting if is_wanted(waiting)]


def _run(future: Future[Result], work: Callable[[], Result]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except BaseException as err:
        future.set_exception(err)
