"""The path of a request from its gateway to the engine, and its waits for KV blocks.

    receive ─▶ prefetched blocks ─▶ its grammar ─▶ the engine's queue
                 ─▶ if it fits: each source of KV blocks in turn ─▶ it may be admitted

``workers.process.intake.intake_request`` names the states. A request has one time limit for its
waits for KV blocks of all sources; the engine computes the blocks that are still missing.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from cluster.core.errors import ExpertMeshError, NotReadyError, QueueFullError, RequestError
from workers.engine.engine import Engine
from workers.process.intake.commands import AddRequest
from workers.process.intake.grammar_compilations import GrammarCompilations
from workers.process.intake.intake_request import IntakeRequest, IntakeState
from workers.process.intake.kv_fetches import KvFetches
from workers.process.intake.kv_source import KvSource
from workers.requests.request import Request
from workers.requests.wire import Abort
from workers.sampling.grammar import CompiledGrammar
from workers.sampling.grammar_compiler import GrammarCompiler

_REASONS = {IntakeState.WAITS_FOR_KV: "kv", IntakeState.COMPILES_GRAMMAR: "grammar"}
"""Reasons for a wait before the engine's queue, as label values of metrics."""


class RequestOwners(Protocol):
    """Records the gateway of each request in the engine, and sends replies to the gateway."""

    owners: dict[str, str]

    def accept(self, gateway: str, request: Request) -> None:
        """Record that the engine has received this request."""

    def refuse(self, gateway: str, request: Request, err: ExpertMeshError) -> None:
        """End a request with an error."""

    def forget_ended(self, request_id: str) -> None:
        """Remove the owner of a request if it has ended."""


class RequestIntake:
    """Decides what a request waits for, and when its wait ends.

    Call the methods on the engine's thread, unless they state otherwise.
    """

    def __init__(
        self,
        engine: Engine,
        owners: RequestOwners,
        grammars: GrammarCompiler,
        compilations: GrammarCompilations,
        fetches: KvFetches,
        sources: Sequence[KvSource],
        may_have_blocks: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``sources``: sources of KV blocks, tried in this order. ``fetches``: the source among
        them that also prefetches. ``may_have_blocks``: whether any source may have blocks.
        """
        self._engine = engine
        self._owners = owners
        self._grammars = grammars
        self.compilations = compilations
        self._fetches = fetches
        self._sources = tuple(sources)
        self._may_have_blocks = may_have_blocks
        self._clock = clock
        self._requests: dict[str, IntakeRequest] = {}
        """Requests by id that are received or wait; queued and refused requests are removed."""
        self._num_waiting: Counter[tuple[str, str]] = Counter()
        """Number of choices that the engine does not have yet, by reason and adapter key. The
        counter is replaced, never changed, as other threads may read it."""

    @property
    def _parts(self) -> tuple[GrammarCompilations | KvSource, ...]:
        """All components in which requests wait."""
        return (self.compilations, *self._sources)

    # Before the engine has the request

    def receive(self, command: AddRequest) -> None:
        """Receive a gateway's request, which replaces an older attempt that waits here."""
        request, name = command.request, command.request.request_id
        new = IntakeRequest(command.gateway, request, command.received, command.hashes)
        known = self._requests.get(name)
        if known is not None and known.request.attempt > request.attempt:
            attempt = known.request.attempt
            stale = f"the worker already has attempt {attempt} of request {name}"
            self._refuse(new, RequestError(stale, "request_id"))
            return
        is_expected = self._fetches.has_prefetch(request)
        for each in self._parts:
            if not (is_expected and each is self._fetches):  # it drops the old attempt itself
                each.drop(name)
        self._engine.end_kv_wait(name)  # the older attempt stays if the engine refuses this one
        self._requests[name] = new
        if not (is_expected and self._start_wait(new, [self._fetches])):
            self._prepare(new)

    def _prepare(self, waiting: IntakeRequest) -> None:
        grammar, owner = waiting.request.params.grammar, waiting.request.cache_salt
        compiled = None if grammar is None else self._grammars.cached(grammar, owner)
        if grammar is None or compiled is not None:
            self._queue(waiting, compiled)
        else:
            waiting.enter(IntakeState.COMPILES_GRAMMAR)
            self.compilations.put(waiting)

    def _queue(self, waiting: IntakeRequest, grammar: CompiledGrammar | None) -> None:
        request = waiting.request
        try:
            self._engine.add_request(request, waiting.received, grammar, waiting.hashes)
        except (RequestError, QueueFullError, NotReadyError) as err:
            self._refuse(waiting, err)
            return
        self._leave(waiting, IntakeState.QUEUED)
        self._owners.accept(waiting.gateway, request)

    def _refuse(self, waiting: IntakeRequest, err: ExpertMeshError) -> None:
        self._leave(waiting, IntakeState.REFUSED)
        self._owners.refuse(waiting.gateway, waiting.request, err)

    def _leave(self, waiting: IntakeRequest, state: IntakeState) -> None:
        waiting.enter(state)
        if self._requests.get(waiting.name) is waiting:
            del self._requests[waiting.name]

    # KV blocks of requests that fit

    def _request_blocks(self) -> None:
        """Let queued requests that fit into the pool wait for KV blocks that sources can load."""
        if not self._may_have_blocks():
            return
        at_most = min(source.num_free_jobs for source in self._sources)
        for request, hashes in self._engine.take_admissible(at_most):
            name = request.request_id
            if name in self._requests:
                continue  # a newer attempt waits already
            queued = IntakeRequest(
                *(self._owners.owners[name], request, self._clock(), hashes),
                state=IntakeState.QUEUED,
                is_in_engine=True,
            )
            if self._start_wait(queued, self._sources):
                self._requests[name] = queued

    def _start_wait(self, waiting: IntakeRequest, sources: Sequence[KvSource]) -> bool:
        """Let a request wait for the first source that has blocks for it; False if none has."""
        num_free, waiting.has_joined = self._engine.pool.num_free, False
        if not any(source.put(waiting) for source in sources):
            return False
        if waiting.state is not IntakeState.WAITS_FOR_KV:
            num_tokens = len(waiting.request.prompt)
            limit_s = max(source.limit_s(num_tokens) for source in self._sources)
            waiting.kv_deadline_s = self._clock() + limit_s
        waiting.enter(IntakeState.WAITS_FOR_KV)
        if waiting.is_in_engine:
            self._engine.wait_for_kv(waiting.name, num_free - self._engine.pool.num_free)
        return True

    def _end_wait(self, waiting: IntakeRequest, left: Sequence[KvSource]) -> None:
        """End a wait for a source. A request in the engine then tries the sources in ``left``."""
        if not waiting.is_in_engine:
            self._prepare(waiting)
            return
        has_time = self._clock() < waiting.kv_deadline_s
        if has_time and waiting.name in self._engine.requests and self._start_wait(waiting, left):
            return
        self._engine.end_kv_wait(waiting.name)
        self._leave(waiting, IntakeState.QUEUED)

    # Events

    def advance(self) -> None:
        """Advance the requests whose wait is over, and the queued ones that fit into the pool."""
        for index, source in enumerate(self._sources):
            for waiting in source.take():
                # A job for another request may load only a part; the source may have the rest.
                self._end_wait(waiting, self._sources[index + (not waiting.has_joined) :])
        self._end_late_waits()
        for done in self.compilations.take():
            if done.error is None:
                self._queue(done.waiting, done.compiled)
            else:
                self._refuse(done.waiting, done.error)
        self._request_blocks()
        self._update_counts()

    def _end_late_waits(self) -> None:
        now = self._clock()
        for waiting in tuple(self._requests.values()):
            if waiting.state is IntakeState.WAITS_FOR_KV and now >= waiting.kv_deadline_s:
                for source in self._sources:
                    source.drop(waiting.name)
                self._end_wait(waiting, ())

    def abort(self, gateway: str, abort: Abort) -> None:
        """End a request of this gateway, or some of its choices."""
        name, waiting = abort.request_id, self._requests.get(abort.request_id)
        if waiting is not None and waiting.gateway == gateway:
            if abort.choices:
                waiting.close(abort.choices)
            else:
                self._drop(waiting)
        if self._owners.owners.get(name) == gateway:
            self._engine.abort(name, abort.choices)
            self._owners.forget_ended(name)

    def drop_gateway(self, gateway: str) -> None:
        """End the requests of a gateway that wait here."""
        for waiting in [w for w in self._requests.values() if w.gateway == gateway]:
            self._drop(waiting)
        for source in self._sources:
            source.drop_gateway(gateway)

    def _drop(self, waiting: IntakeRequest) -> None:
        del self._requests[waiting.name]
        for each in self._parts:
            each.drop(waiting.name)

    def wait_s(self, at_most_s: float) -> float:
        """Seconds until the next deadline of a waiting request, at most ``at_most_s``."""
        deadlines = (waiting.kv_deadline_s for waiting in self._requests.values())
        own_s = max(0.0, min(deadlines, default=math.inf) - self._clock())
        return min(own_s, *(each.wait_s(at_most_s) for each in self._parts))

    # Statistics: any thread

    def _update_counts(self) -> None:
        numbers: Counter[tuple[str, str]] = Counter()
        for waiting in self._requests.values():
            if not waiting.is_in_engine:
                numbers[_REASONS[waiting.state], waiting.request.adapter] += waiting.request.n
        self._num_waiting = numbers

    def count_waiting(self, stats: dict[str, float]) -> Counter[str]:
        """Add the waiting choices to gauges in ``stats``; returns their number by adapter key."""
        by_adapter: Counter[str] = Counter()
        for reason in _REASONS.values():
            stats.setdefault(f'num_requests_waiting_by_reason{{reason="{reason}"}}', 0.0)
        for (reason, adapter), count in self._num_waiting.items():
            by_adapter[adapter] += count
            stats["num_requests_waiting"] += count
            stats[f'num_requests_waiting_by_reason{{reason="{reason}"}}'] += count
        return by_adapter

    def adapters(self) -> frozenset[str]:
        """Keys of the adapters of waiting requests."""
        return frozenset(adapter for _, adapter in self._num_waiting if adapter)
