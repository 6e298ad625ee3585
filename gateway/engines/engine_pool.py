"""All streams of this replica: one to each attention worker of the current generation.

The requests of a stream that ends continue at another worker, with their output so far. Those of a
worker that is drained move before, with their KV blocks (``moves``). Without any worker they wait
here, each up to its deadline: then its ``Generation`` ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

from cluster.core.errors import NotReadyError, PoisonousRequestError, RequestFailedError
from gateway.cluster.view import AttentionEndpoint
from gateway.core.replay import ReplayCause
from gateway.engines.engine_client import PING_S, SILENCE_LIMIT_S, EngineClient, StreamEnd
from gateway.engines.kv_index import KvIndex
from gateway.engines.moves import Moves
from gateway.engines.pauses import Pauses
from gateway.engines.router import RoutingPolicy, pick_worker, route_by_kv
from gateway.engines.session_copies import SessionCopies
from gateway.engines.session_homes import SessionHomes
from gateway.engines.submission import OutputSink, RequestStage, Submission
from workers.requests.block_hash import BlockHash, KvEvents, block_hashes
from workers.requests.request import Request
from workers.requests.wire import Paused, Prefetched

logger = logging.getLogger(__name__)

_RETRY_S = 0.2
_VERDICT_LIMIT_S = 10.0
"""Time for which a request waits to learn whether a worker lives."""
ROOM_FACTOR = 4
"""A worker takes a request from one that runs short of blocks if it has room for so many times the
request's tokens: others may take much of the room before the request arrives, and it must not move
back soon."""
_REFUSED_RETRY_S = 0.1
"""Time before a request that a worker handed back may go to the same worker again."""


class EnginePool:
    """Keeps the streams and hands requests to them.

    Args:
        token: the cluster token.
        gateway: name of this replica.
        policy: how a worker is picked.
        silence_limit_s: as for ``EngineClient``.
        ping_s: as for ``EngineClient``.
    """

    def __init__(
        self,
        token: str,
        gateway: str,
        policy: RoutingPolicy = RoutingPolicy.KV,
        *,
        silence_limit_s: float = SILENCE_LIMIT_S,
        ping_s: float = PING_S,
    ) -> None:
        self._connect = partial(
            EngineClient,
            token=token,
            gateway=gateway,
            owner=self,
            silence_limit_s=silence_limit_s,
            ping_s=ping_s,
        )
        self._policy = policy
        self._clients: dict[str, EngineClient] = {}
        self._keepers: dict[AttentionEndpoint, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._num_routed = 0
        self.kv = KvIndex()
        """Which worker has which blocks."""
        self._homes = SessionHomes()
        self._copies = SessionCopies(lambda: self.clients, self.kv)
        self.pauses = Pauses()
        """How long streams stood still at changes of the generation."""
        self._moves = Moves(self._has_other, self._pick_other, self._go_over)
        self._leaving: frozenset[str] = frozenset()
        """Workers that are drained: they get no requests any more."""
        self._lacking: dict[str, frozenset[str]] = {}
        """By worker, the adapters that it could not load."""
        self._waiting: list[Submission] = []
        self._accused: list[tuple[Submission, str]] = []
        """Requests whose last worker seems to have died of them, and why: they fail once it is
        known to be dead, and continue if only the connection was lost."""
        self._unjudged: dict[str, float] = {}
        """Workers to which the connection was lost, and which may live; ``time.monotonic``."""
        self._will_place = False
        self._is_stopping = False
        self.on_resubmit: Callable[[Submission], None] = lambda entry: None
        """Called when a request moves to another worker."""

    @property
    def clients(self) -> list[EngineClient]:
        """Open streams to workers that take requests, by worker name."""
        return sorted(
            (
                client
                for client in self._clients.values()
                if client.hello is not None and client.worker not in self._leaving
            ),
            key=lambda client: client.worker,
        )

    def num_places(self, max_num_seqs: int) -> int:
        """Requests that all workers run at once: so many each, or where KV blocks run short as many
        as decode now."""
        return sum(client.num_places(max_num_seqs) for client in self.clients)

    def update(self, endpoints: Sequence[AttentionEndpoint], living: Collection[str] = ()) -> None:
        """Open streams to new workers, and drop the streams of workers that are no longer listed.

        Those among them that are ``living`` count as leaving, not as dying. Requests of workers
        that are listed as leaving move to others.
        """
        before, self._leaving = self._leaving, frozenset(e.name for e in endpoints if e.is_leaving)
        known, self._lacking = self._lacking, {e.name: e.lacks for e in endpoints if e.lacks}
        for gone in set(self._keepers) - set(endpoints):
            logger.info("%s left the generation: stream dropped", gone.name)
            self._keepers.pop(gone).cancel()
            if (client := self._clients.pop(gone.name, None)) is not None:
                has_died = gone.name not in living
                self._lose(client, StreamEnd("the worker left the generation", has_died))
            self._judge(gone.name, gone.name not in living)
        for endpoint in endpoints:
            if endpoint not in self._keepers:
                self._keepers[endpoint] = asyncio.create_task(self._keep(endpoint))
        for worker in before - self._leaving:
            self._moves.end(worker)
        for worker in self._leaving - before:
            if (client := self._clients.get(worker)) is not None:
                self._moves.begin(client)
        if before - self._leaving or known != self._lacking:
            self.place_waiting()

    def assign(
        self,
        request: Request,
        sink: OutputSink,
        deadline_s: float,
        hashes: Sequence[BlockHash] = (),
    ) -> Submission | None:
        """Hand a request to a worker; None while no stream is open.

        ``hashes`` name its KV blocks, where they are known. ``deadline_s`` is the
        ``time.monotonic`` at which the request is given up. Requests that arrive together are
        routed together, the one with the fewest tokens to compute first.
        """
        if not self.clients:
            return None
        entry = Submission(request, sink, deadline_s)
        if hashes:
            entry.set_hashes(hashes)
        self._waiting.append(entry)
        if not self._will_place:
            self._will_place = True
            asyncio.get_running_loop().call_soon(self.place_waiting)
        return entry

    async def wait_change(self, timeout_s: float) -> None:
        """Return when a stream opens or ends, or after ``timeout_s``."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)

    async def stop(self) -> None:
        """End all streams; their requests fail."""
        self._is_stopping = True
        keepers = list(self._keepers.values())
        self.update([])
        await asyncio.gather(*keepers, return_exceptions=True)

    def _pick(self, entry: Submission, ready: Sequence[EngineClient]) -> EngineClient | None:
        """The worker for a request, which has its adapter; its last one only if there is no
        other."""
        clients = {client.worker: client for client in ready if self._may_have(entry, client)}
        if len(clients) > 1:
            clients.pop(entry.last_worker, None)
        if not clients:
            return None
        loads, tokens = [client.load for client in clients.values()], entry.num_known_tokens
        if self._policy is RoutingPolicy.KV:
            size = self._name_blocks(entry, ready[0])
            hashes = entry.prompt_hashes
            home = self._homes.get(entry.request)
            choice = route_by_kv(self.kv, hashes, loads, self._num_routed, tokens, size, home)
        else:
            for client in clients.values():
                client.load.outstanding_tokens = client.outstanding_tokens
            choice = pick_worker(loads, self._policy, self._num_routed)
        self._num_routed += 1
        entry.missing_tokens = max(tokens - choice.cached_tokens, 0)
        entry.kv_peer = choice.peer
        self._homes.put(entry.request, choice.load.name)
        return clients[choice.load.name]

    def _may_have(self, entry: Submission, client: EngineClient) -> bool:
        """Whether a worker can run a request: it lacks no adapter of the request."""
        return entry.request.adapter not in self._lacking.get(client.worker, ())

    def has_adapter(self, key: str) -> bool:
        """Whether a worker can run requests with an adapter, or it is not known which ones serve;
        an empty key is that of the model itself.
        """
        clients = self.clients
        return not clients or any(key not in self._lacking.get(c.worker, ()) for c in clients)

    def _has_other(self, entry: Submission) -> bool:
        return any(self._may_have(entry, client) for client in self.clients)

    def _pick_other(self, entry: Submission) -> EngineClient | None:
        """The worker that a request moves to."""
        ready = self.clients
        return self._pick(entry, ready) if ready else None

    def _go_over(self, entry: Submission, target: EngineClient | None, num_new: int) -> None:
        """A request leaves its worker for another one, which has the KV blocks of all but its
        newest tokens, or for any.
        """
        source = entry.stream
        assert isinstance(source, EngineClient), "it moves while it has a worker"
        source.give_up(entry)
        entry.replay_cause = ReplayCause.HANDED_BACK if target is None else ReplayCause.MOVED
        if target is None or target.worker in self._leaving:
            self._waiting.append(entry)
            self.place_waiting()
            return
        with self._isolate(entry):
            entry.kv_peer, entry.missing_tokens = "", num_new
            self.kv.expect(target.worker, entry.prompt_hashes)
            entry.next_attempt(time.monotonic())
            target.submit(entry)
            self.on_resubmit(entry)

    def _num_missing(self, entry: Submission, ready: Sequence[EngineClient]) -> int:
        """Tokens of a request without a worker; sets the hashes of its blocks."""
        tokens = entry.num_known_tokens
        if self._policy is not RoutingPolicy.KV or not ready:
            return tokens
        block_size = self._name_blocks(entry, ready[0])
        found = self.kv.matches(entry.prompt_hashes)
        return tokens - block_size * max(found.values(), default=0)

    def _name_blocks(self, entry: Submission, client: EngineClient) -> int:
        """Set its prompt's hashes; returns the tokens of a block."""
        hello = client.hello
        assert hello is not None, "only workers that said hello take requests"
        block_size = hello.kv_block_size
        if block_size and not entry.prompt_hashes:
            limit = hello.kv_length_matters_above
            entry.set_hashes(block_hashes(entry.request, block_size, limit))
        return block_size

    async def _keep(self, endpoint: AttentionEndpoint) -> None:
        """One stream after the other to the same worker, as long as it is listed."""
        while True:
            client = self._clients[endpoint.name] = self._connect(endpoint)
            announcer = asyncio.create_task(self._announce(client))
            end = StreamEnd("the worker left the generation", has_died=False)
            try:
                end = await client.run()
                self._unjudged.setdefault(client.worker, time.monotonic())
            finally:
                announcer.cancel()
                if self._clients.get(endpoint.name) is client:
                    del self._clients[endpoint.name]
                self._lose(client, end)
            logger.warning("stream to %s ended: %s", endpoint.name, end.reason)
            await asyncio.sleep(_RETRY_S)

    async def _announce(self, client: EngineClient) -> None:
        await client.connected.wait()
        self._judge(client.worker, has_died=False)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _lose(self, client: EngineClient, end: StreamEnd) -> None:
        """A stream is unusable: other workers continue its requests."""
        self.kv.drop(client.worker)
        self._moves.end(client.worker)
        reason, lost = end.reason, client.take_submissions()
        has_suspect = any(entry.may_kill_on_receipt for entry in lost)
        for entry in lost:
            name = entry.request.request_id
            if self._is_stopping:
                entry.sink.fail(NotReadyError(f"the gateway ends ({reason})", "not_ready", 1.0))
                continue
            logger.warning("request %s was lost with %s: %s", name, client.worker, reason)
            has_died_with = end.has_died and (entry.may_kill_on_receipt or not has_suspect)
            if (cause := entry.lose() if has_died_with else None) is not None:
                self._accused.append((entry, f"{cause}: {reason}"))
                continue
            entry.replay_cause = ReplayCause.LOST if end.has_died else ReplayCause.HANDED_BACK
            self._waiting.append(entry)
        self.place_waiting()
        self._notify()

    def _judge(self, worker: str, has_died: bool) -> None:
        """It is known whether a worker lives to which the connection was lost."""
        self._unjudged.pop(worker, None)
        accused, self._accused = self._accused, []
        for entry, why in accused:
            if entry.last_worker != worker:
                self._accused.append((entry, why))
            elif self._is_stopping:
                entry.sink.fail(NotReadyError("the gateway ends", "not_ready", 1.0))
            elif not has_died:
                self._waiting.append(entry)
            elif entry.is_waiting:
                entry.close()
                name = entry.request.request_id
                entry.sink.fail(PoisonousRequestError(f"request {name}: {why}"))
        if not has_died:
            for entry in self._waiting:
                entry.acquit(worker)
            for client in self._clients.values():
                client.acquit(worker)
        self.place_waiting()

    def computed(self, client: EngineClient, entry: Submission) -> None:
        self._copies.note_prompt(entry, client)

    def note_token(self, entry: Submission, now_s: float) -> None:
        if entry.last_token_s:
            self.pauses.token(entry.last_token_s, now_s)
        entry.last_token_s = now_s
        self._moves.note_token(entry)

    def prefetched(self, client: EngineClient, message: Prefetched) -> None:
        self._moves.prefetched(client, message)

    def paused(self, client: EngineClient, message: Paused) -> None:
        self._moves.paused(client, message)

    def relieve(self, client: EngineClient, entry: Submission) -> None:
        needed = ROOM_FACTOR * entry.num_known_tokens
        others = [
            c
            for c in self.clients
            if c is not client and c.load.free_tokens >= needed and self._may_have(entry, c)
        ]
        if others:
            self._moves.relieve(entry, client, max(others, key=lambda c: c.load.free_tokens))

    def released(self, entry: Submission) -> None:
        self._moves.drop(entry)
        if not entry.open_choices and entry.last_worker in self._clients:
            self._copies.note_end(entry, self._clients[entry.last_worker])

    def take_kv(self, worker: str, events: KvEvents) -> bool:
        return self.kv.apply(worker, events)

    def settle(self, entry: Submission, worker: str) -> None:
        self.kv.settle(worker, entry.prompt_hashes)
        if entry.must_be_sent_alone:  # it ended
            asyncio.get_running_loop().call_soon(self.place_waiting)

    def take_back(self, entry: Submission, reason: str) -> None:
        logger.info("request %s was handed back: %s", entry.request.request_id, reason)
        entry.replay_cause = ReplayCause.HANDED_BACK
        self._waiting.append(entry)
        has_other = entry.num_returns == 1 and len(self.clients) > 1
        delay_s = 0.0 if has_other else _REFUSED_RETRY_S
        asyncio.get_running_loop().call_later(delay_s, self.place_waiting)

    def place_waiting(self) -> None:
        """Send the requests that wait for a worker, and may be sent now."""
        self._will_place = False
        waiting, self._waiting = self._waiting, []
        now_s, ready = time.monotonic(), self.clients
        unjudged = [w for w, at in self._unjudged.items() if now_s - at < _VERDICT_LIMIT_S]
        has_lone_request = any(e.must_be_sent_alone for e in waiting) and any(
            entry.must_be_sent_alone
            for client in self._clients.values()
            for entry in client.requests_at(RequestStage.SENT)
        )
        by_cost: list[tuple[int, Submission]] = []
        for entry in waiting:
            with self._isolate(entry):
                by_cost.append((self._num_missing(entry, ready), entry))
        for _, entry in sorted(by_cost, key=lambda pair: pair[0]):
            if not entry.is_waiting or now_s >= entry.deadline_s:
                continue
            is_second_lone = entry.must_be_sent_alone and has_lone_request
            has_to_wait = is_second_lone or entry.awaits_verdict(unjudged)
            with self._isolate(entry):
                client = None if has_to_wait else self._pick(entry, ready)
                if client is None:
                    self._waiting.append(entry)
                    continue
                self.kv.expect(client.worker, entry.prompt_hashes)
                has_lone_request = has_lone_request or entry.must_be_sent_alone
                is_again = entry.was_sent
                if is_again:
                    entry.next_attempt(now_s)
                client.submit(entry)
                if is_again:
                    self.on_resubmit(entry)

    @contextlib.contextmanager
    def _isolate(self, entry: Submission) -> Iterator[None]:
        """An error fails this request alone: the others are still placed."""
        try:
            yield
        except Exception as err:
            name = entry.request.request_id
            logger.exception("request %s cannot be placed", name)
            entry.abort()
            entry.close()
            entry.sink.fail(RequestFailedError(f"request {name} cannot be placed: {err}"))
