"""Requests that wait until their grammar is compiled, so that the engine never does.

Each grammar is compiled in a thread of its own, a few at a time; llguidance lets the other threads
run meanwhile. A thread cannot be ended: one that is over its time is left alone, and what waited
for it is refused. llguidance bounds its own work, so it ends by itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.errors import ExpertMeshError, RequestError, RequestFailedError
from workers.engine_server import AddRequest
from workers.grammar import CompiledGrammar
from workers.request import Grammar
from workers.waiting import WaitingRequests

logger = logging.getLogger(__name__)

COMPILE_LIMIT_S = 2.0
"""Time that a grammar may take to compile."""
MAX_COMPILING = 2
"""Grammars that are compiled at the same time, those over their time not counted."""


@dataclass(frozen=True, slots=True)
class Gated:
    """A request whose wait is over."""

    command: AddRequest
    """As it came."""
    compiled: CompiledGrammar | None
    """Its grammar; None after an error."""
    error: ExpertMeshError | None = None
    """Why it is refused."""


@dataclass(slots=True, eq=False)
class _Job:
    """One grammar on its way."""

    grammar: Grammar
    waiting: list[AddRequest] = field(default_factory=list)
    started: float | None = None
    compiled: CompiledGrammar | None = None
    error: ExpertMeshError | None = None
    is_done: bool = False
    """Written last, by the job's thread."""


class GrammarGate(WaitingRequests):
    """See the module. All methods belong to the engine's thread.

    Args:
        compile: makes a grammar in another thread; raises ``RequestError``.
        wake: called, by any thread, when there is something to take.
        clock: monotonic seconds.
        limit_s: see ``COMPILE_LIMIT_S``.
    """

    def __init__(
        self,
        compile: Callable[[Grammar], CompiledGrammar],
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        limit_s: float = COMPILE_LIMIT_S,
    ) -> None:
        self._compile = compile
        self._wake = wake
        self._clock = clock
        self._limit_s = limit_s
        self._pending: deque[_Job] = deque()
        self._running: list[_Job] = []

    def put(self, command: AddRequest) -> None:
        """Let a request with a grammar wait."""
        grammar = command.request.params.grammar
        assert grammar is not None, "only requests with a grammar wait"
        job = next((job for job in self._all_jobs() if job.grammar == grammar), None)
        if job is None:
            job = _Job(grammar)
            self._pending.append(job)
        job.waiting.append(command)
        self._start_jobs()
        self._count()

    def take(self) -> list[Gated]:
        """Requests whose wait is over, in the order in which their grammars were begun."""
        now, found = self._clock(), []
        for job in tuple(self._running):
            if job.is_done:
                found += [Gated(c, job.compiled, job.error) for c in job.waiting]
            elif job.started is not None and now - job.started >= self._limit_s:
                error = self._too_slow(job.grammar)
                found += [Gated(c, None, error) for c in job.waiting]
            else:
                continue
            self._running.remove(job)
        self._start_jobs()
        self._count()
        return found

    def wait_s(self, at_most_s: float) -> float:
        """Seconds until a limit passes, if that is sooner than ``at_most_s``."""
        starts = [job.started for job in self._running if job.started is not None]
        if not starts:
            return at_most_s
        return min(at_most_s, max(0.0, min(starts) + self._limit_s - self._clock()))

    def _all_jobs(self) -> tuple[_Job, ...]:
        return (*self._pending, *self._running)

    def _keep(self, is_wanted: Callable[[AddRequest], bool]) -> None:
        super()._keep(is_wanted)
        self._pending = deque(job for job in self._pending if job.waiting)

    def _start_jobs(self) -> None:
        while self._pending and len(self._running) < MAX_COMPILING:
            job = self._pending.popleft()
            job.started = self._clock()
            self._running.append(job)
            threading.Thread(
                target=self._run, args=(job,), name="grammar-compiler", daemon=True
            ).start()

    def _run(self, job: _Job) -> None:
        try:
            job.compiled = self._compile(job.grammar)
        except ExpertMeshError as err:
            job.error = err
        except Exception:
            logger.exception("a grammar could not be compiled")
            job.error = RequestFailedError("the grammar could not be compiled")
        job.is_done = True
        self._wake()

    def _too_slow(self, grammar: Grammar) -> RequestError:
        rule = f"is too complex: it was not compiled within {self._limit_s:g} s"
        return RequestError(f"{grammar.field} {rule}", grammar.field)
