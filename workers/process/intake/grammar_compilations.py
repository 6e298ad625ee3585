"""Compiles the grammars of requests in threads, so that the engine's thread never waits.

A few grammars are compiled at a time; llguidance releases the interpreter lock. If a compilation
exceeds its time limit, its requests are refused and the next grammar starts. A thread cannot be
stopped, but llguidance bounds its own work, so the late thread ends by itself.

A resumed request (attempt above 0) has no time limit: another worker has compiled its grammar in
time, and after the requests of a worker have moved, many grammars are compiled at once.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from cluster.core.errors import ExpertMeshError, RequestError, RequestFailedError
from workers.process.intake.intake_request import IntakeRequest
from workers.process.intake.waiting import Job, WaitingRequests
from workers.requests.request import Grammar
from workers.sampling.grammar import CompiledGrammar

logger = logging.getLogger(__name__)

COMPILE_LIMIT_S = 2.0
"""Time limit for the compilation of a grammar."""
MAX_COMPILING = 2
"""Maximum number of concurrent compilations that are within the time limit."""
MAX_THREADS = 16
"""Maximum number of concurrent compilations, with those that exceed the time limit."""


@dataclass(frozen=True, slots=True)
class CompiledRequest:
    """A request whose wait for its grammar is over."""

    waiting: IntakeRequest
    compiled: CompiledGrammar | None
    """The compiled grammar; None after an error."""
    error: ExpertMeshError | None = None


@dataclass(kw_only=True, slots=True, eq=False)
class _Job(Job):
    grammar: Grammar
    owner: str
    """``cache_salt`` of its requests; requests with another one do not share the compilation."""
    compiling: Future[CompiledGrammar] | None = None

    @property
    def is_late(self) -> bool:
        """Whether the time limit is exceeded, after which only resumed requests wait for it."""
        return self.compiling is not None and self.deadline_s == math.inf


class GrammarCompilations(WaitingRequests):
    """Compiles grammars in threads. Call the methods on the engine's thread only.

    Args:
        compile: compiles a grammar for a ``cache_salt``, in a thread. Raises ``RequestError``.
        wake: called, on any thread, when there is something to take.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        compile: Callable[[Grammar, str], CompiledGrammar],
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(wake, clock, "grammar-compiler", MAX_THREADS)
        self._compile = compile
        self._pending: deque[_Job] = deque()
        self._running: list[_Job] = []
        self._busy: list[Future[CompiledGrammar]] = []
        """Compilations that have not ended, even if no request waits for them any more."""

    def put(self, waiting: IntakeRequest) -> None:
        """Queue a request with a grammar."""
        request, grammar = waiting.request, waiting.request.params.grammar
        assert grammar is not None, "only requests with a grammar wait"
        is_new, owner = not request.attempt, request.cache_salt
        known = self._all_jobs()
        same = (job for job in known if (job.grammar, job.owner) == (grammar, owner))
        job = next((job for job in same if not (is_new and job.is_late)), None)
        if job is None:
            job = _Job(grammar=grammar, owner=owner)
            self._pending.append(job)
        job.waiting.append(waiting)
        self._start_jobs()

    def take(self) -> list[CompiledRequest]:
        """Requests whose wait is over, in the order in which their compilations started."""
        now, requests = self._clock(), []
        for job in tuple(self._running):
            assert job.compiling is not None, "a running job has been started"
            if job.compiling.done():
                compiled, error = _result(job.compiling)
                ended, job.waiting = job.waiting, []
            elif now >= job.deadline_s:
                compiled, error = None, self._too_slow(job.grammar)
                ended = [waiting for waiting in job.waiting if not waiting.request.attempt]
                job.waiting = [waiting for waiting in job.waiting if waiting.request.attempt]
                job.deadline_s = math.inf
            else:
                continue
            requests += [CompiledRequest(waiting, compiled, error) for waiting in ended]
            if not job.waiting:
                self._running.remove(job)
        self._start_jobs()
        return requests

    def _all_jobs(self) -> tuple[_Job, ...]:
        return (*self._pending, *self._running)

    def _keep(self, is_wanted: Callable[[IntakeRequest], bool]) -> None:
        super()._keep(is_wanted)
        self._pending = deque(job for job in self._pending if job.waiting)

    def _start_jobs(self) -> None:
        self._busy = [compiling for compiling in self._busy if not compiling.done()]
        while self._pending and self._may_start():
            job = self._pending.popleft()
            job.deadline_s = self._clock() + COMPILE_LIMIT_S
            job.compiling = self._start(partial(self._compile, job.grammar, job.owner))
            self._running.append(job)
            self._busy.append(job.compiling)

    def _may_start(self) -> bool:
        """Whether a thread is free, and few compilations are within their time limit."""
        num_in_time = sum(not job.is_late for job in self._running)
        return num_in_time < MAX_COMPILING and len(self._busy) < MAX_THREADS

    def _too_slow(self, grammar: Grammar) -> RequestError:
        rule = f"is too complex: it was not compiled within {COMPILE_LIMIT_S:g} s"
        return RequestError(f"{grammar.field} {rule}", grammar.field)


def _result(
    compiling: Future[CompiledGrammar],
) -> tuple[CompiledGrammar | None, ExpertMeshError | None]:
    try:
        return compiling.result(), None
    except ExpertMeshError as err:
        return None, err
    except Exception:
        logger.exception("a grammar could not be compiled")
        return None, RequestFailedError("the grammar could not be compiled")
