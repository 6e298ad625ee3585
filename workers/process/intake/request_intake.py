"""The road of a request from its gateway to the engine.

A request may wait for KV blocks that are fetched ahead of it, and for its grammar; in the engine it
may wait for blocks of a lower tier or of a peer, once there is room for it.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from cluster.core.errors import ExpertMeshError, NotReadyError, QueueFullError, RequestError
from workers.engine.engine import Engine
from workers.process.intake.commands import AddRequest
from workers.process.intake.grammar_compilations import GrammarCompilations
from workers.process.intake.kv_fetches import KvFetches
from workers.process.intake.kv_restores import KvRestores
from workers.process.intake.waiting import WaitingRequests, count_waiting, stale_error
from workers.requests.request import Request
from workers.requests.wire import Abort
from workers.sampling.grammar import CompiledGrammar
from workers.sampling.grammar_compiler import GrammarCompiler


class RequestOwners(Protocol):
    """Knows which gateway has which request of the engine, and answers it."""

    owners: dict[str, str]

    def accept(self, gateway: str, request: Request) -> None:
        """The engine has a request now."""

    def refuse(self, gateway: str, request: Request, err: ExpertMeshError) -> None:
        """A request ends with an error."""

    def forget_ended(self, request_id: str) -> None:
        """Drop the owner of a request if it has ended."""


class RequestIntake:
    """Decides for what a request waits before the engine runs it.

    All methods belong to the engine's thread, except where they say otherwise.
    """

    def __init__(
        self,
        engine: Engine,
        owners: RequestOwners,
        grammars: GrammarCompiler,
        compilations: GrammarCompilations,
        fetches: KvFetches,
        restores: KvRestores | None,
        has_peers: Callable[[], bool],
    ) -> None:
        """``has_peers``: whether this generation has another worker with KV blocks."""
        self._engine = engine
        self._owners = owners
        self._grammars = grammars
        self.compilations = compilations
        self._fetches = fetches
        self._restores = restores
        self._has_peers = has_peers

    @property
    def waiting(self) -> tuple[WaitingRequests, ...]:
        """Where requests may wait before the engine runs them. Any thread."""
        known = (self.compilations, self._fetches)
        return known if self._restores is None else (*known, self._restores)

    def receive(self, command: AddRequest) -> None:
        """Hand a request to the engine. It may wait here for KV blocks that are fetched ahead of
        it, and for its grammar."""
        request = command.request
        name, is_expected = request.request_id, self._fetches.expects(request)
        if (stale := stale_error(request, self.waiting)) is not None:
            self._owners.refuse(command.gateway, request, stale)
            return
        for waiting in self.waiting:  # an older attempt
            if not (is_expected and waiting is self._fetches):
                waiting.drop(name)
        self._engine.kv_came(name)  # it may stay, where the engine refuses this one
        if not (is_expected and self._fetches.put(command)):
            self._prepare(command)

    def advance(self) -> None:
        """Move on the requests whose wait is over, and those for which there is room."""
        if self._restores is not None:
            for restored in self._restores.take():
                self._end_restore(restored)
        for ready in self._fetches.take():
            self._end_fetch(ready)
        for done in self.compilations.take():
            if done.error is None:
                self._add(done.command, done.compiled)
            else:
                self._owners.refuse(done.command.gateway, done.command.request, done.error)
        self._bring_blocks()

    def abort(self, gateway: str, abort: Abort) -> None:
        """End a request of this gateway, or some of its choices."""
        for waiting in self.waiting:
            if waiting.owner(abort.request_id) == gateway:
                waiting.drop(abort.request_id, abort.choices)
        if self._owners.owners.get(abort.request_id) == gateway:
            self._engine.abort(abort.request_id, abort.choices)
            self._owners.forget_ended(abort.request_id)

    def drop_gateway(self, gateway: str) -> None:
        """End the requests of a gateway that wait here."""
        for waiting in self.waiting:
            waiting.drop_gateway(gateway)

    def wait_s(self, at_most_s: float) -> float:
        """Seconds until the time of a request that waits is over, if that is sooner."""
        return min(waiting.wait_s(at_most_s) for waiting in self.waiting)

    def _bring_blocks(self) -> None:
        """Let requests for which there is room wait for KV blocks of a tier, then for those of a
        peer."""
        if self._restores is None and not self._has_peers():
            return
        engine = self._engine
        at_most = sys.maxsize if self._restores is None else self._restores.num_free_jobs
        for request, hashes in engine.take_admissible(at_most):
            name, num_free = request.request_id, engine.pool.num_free
            if any(waiting.owner(name) is not None for waiting in self.waiting):
                continue  # a newer attempt
            gateway = self._owners.owners[name]
            queued = AddRequest(gateway, request, time.monotonic(), hashes, is_queued=True)
            if self._restore(queued) or self._fetches.put(queued):
                engine.wait_for_kv(name, num_free - engine.pool.num_free)

    def _restore(self, queued: AddRequest) -> bool:
        return self._restores is not None and self._restores.put(queued)

    def _end_restore(self, restored: AddRequest) -> None:
        """A request whose beginning came for another one may wait for the rest."""
        engine = self._engine
        name, num_free = restored.request.request_id, engine.pool.num_free
        if name in engine.requests and (
            (restored.has_joined and self._restore(restored)) or self._fetches.put(restored)
        ):
            engine.wait_for_kv(name, num_free - engine.pool.num_free)
        else:
            engine.kv_came(name)

    def _end_fetch(self, fetched: AddRequest) -> None:
        if fetched.is_queued:
            self._engine.kv_came(fetched.request.request_id)
        else:
            self._prepare(fetched)

    def _prepare(self, command: AddRequest) -> None:
        grammar, owner = command.request.params.grammar, command.request.cache_salt
        compiled = None if grammar is None else self._grammars.cached(grammar, owner)
        if grammar is None or compiled is not None:
            self._add(command, compiled)
        else:
            self.compilations.put(command)

    def _add(self, command: AddRequest, grammar: CompiledGrammar | None) -> None:
        request = command.request
        try:
            self._engine.add_request(request, command.received, grammar, command.hashes)
        except (RequestError, QueueFullError, NotReadyError) as err:
            self._owners.refuse(command.gateway, request, err)
            return
        self._owners.accept(command.gateway, request)

    # Numbers: control thread

    def count_waiting(self, stats: dict[str, float]) -> Counter[str]:
        """Add the choices that wait to the gauges; returns them by key of their adapter."""
        return count_waiting(stats, self.waiting)

    def adapters(self) -> frozenset[str]:
        """Keys of the adapters of requests that wait here."""
        return frozenset[str]().union(*(waiting.adapters for waiting in self.waiting))
