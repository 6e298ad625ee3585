"""All engine streams of a gateway replica: one to each attention worker of the current generation.

If a stream ends, its requests continue at another worker, with their output so far. If a worker is
drained, its requests move to other workers with their KV blocks (``moves``). If no worker is
connected, requests wait in this process until their ``RunningCall`` ends them at their deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Sequence
from functools import partial

from gateway.cluster.view import AttentionEndpoint
from gateway.engines.assignment_queue import AssignmentQueue
from gateway.engines.disconnects import DisconnectResolver
from gateway.engines.engine_client import EngineClient
from gateway.engines.engine_stream import PING_S, SILENCE_LIMIT_S, EngineStream, StreamEnd
from gateway.engines.hand_overs import HandOvers
from gateway.engines.kv_index import KvIndex
from gateway.engines.pause_tracker import PauseTracker
from gateway.engines.request_mover import RequestMover
from gateway.engines.request_router import RequestRouter
from gateway.engines.router import RoutingPolicy
from gateway.engines.session_copier import SessionCopier
from gateway.engines.stream_events import (
    MessageReceived,
    RequestChange,
    RequestEvent,
    StreamEvent,
    StreamEvents,
    TokensReceived,
)
from gateway.engines.submission import OutputSink, Submission
from gateway.engines.worker_registry import WorkerRegistry
from workers.requests.block_hash import BlockHash, KvEvents
from workers.requests.request import Request
from workers.requests.wire import KvResync, Paused, Prefetched

logger = logging.getLogger(__name__)

_RETRY_S = 0.2


class EnginePool:
    """Keeps one gRPC stream to each attention worker, and assigns requests to the workers.

    Args:
        token: the cluster token.
        gateway: name of this gateway replica.
        policy: routing policy, which chooses the worker of a request.
        silence_limit_s: seconds without a message from a worker after which its stream ends.
        ping_s: interval in seconds between two pings to a worker.
        connect: makes the stream to a worker; None makes gRPC streams.
    """

    def __init__(
        self,
        token: str,
        gateway: str,
        policy: RoutingPolicy = RoutingPolicy.KV,
        *,
        silence_limit_s: float = SILENCE_LIMIT_S,
        ping_s: float = PING_S,
        connect: Callable[[AttentionEndpoint], EngineStream] | None = None,
    ) -> None:
        self._connect = connect or partial(
            EngineStream,
            token=token,
            gateway=gateway,
            silence_limit_s=silence_limit_s,
            ping_s=ping_s,
        )
        self._events = StreamEvents(self._handle)
        self._connectors: dict[AttentionEndpoint, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self.workers = WorkerRegistry()
        """The connected workers and the requests that each can run."""
        self._router = RequestRouter(self.workers, policy)
        self.disconnects = DisconnectResolver()
        """Decides which requests of lost connections continue and which fail."""
        self.on_resubmit: Callable[[Submission], None] = lambda entry: None
        """Callback for a request that is sent to a worker again with its output so far."""
        self.assignments = AssignmentQueue(
            self.workers, self._router, self.disconnects, lambda entry: self.on_resubmit(entry)
        )
        """Queue of the requests that wait for a worker."""
        self._copies = SessionCopier(self.workers, self.kv)
        self.pauses = PauseTracker()
        """Measures gaps between the tokens of client streams when the generation changes."""
        self.moves = RequestMover(self.workers, self._router, self.assignments)
        """Moves decoding requests with their KV blocks to other workers."""
        self.hand_overs = HandOvers(self.workers, self._router, self.assignments)
        """Hands requests over from the prefill group to the decode group."""
        self.moves.on_cancel = self.hand_overs.stay

    @property
    def clients(self) -> list[EngineClient]:
        """Clients of the connected workers that accept requests, sorted by worker name."""
        return self.workers.ready

    @property
    def kv(self) -> KvIndex:
        """Index of the KV blocks that each worker has cached."""
        return self._router.kv

    def update(self, endpoints: Sequence[AttentionEndpoint], living: Collection[str] = ()) -> None:
        """Open streams to new workers, and end the streams of workers not in ``endpoints``.

        Workers in ``living`` count as alive although their streams end. Requests of workers that
        are being drained move to other workers.
        """
        workers = self.workers
        before, known = workers.leaving, workers.lacking
        workers.set_endpoints(endpoints)
        for gone in set(self._connectors) - set(endpoints):
            logger.info("closed the stream to %s, which left the generation", gone.name)
            self._connectors.pop(gone).cancel()
            has_died = gone.name not in living
            if (client := workers.clients.pop(gone.name, None)) is not None:
                self._handle_lost_stream(
                    client, StreamEnd("the worker left the generation", has_died)
                )
            self._resolve_disconnect(gone.name, has_died)
        for endpoint in endpoints:
            client = workers.clients.get(endpoint.name)
            if client is not None and client.set_group(endpoint.group):
                self.hand_overs.change(client)
            if endpoint not in self._connectors:
                self._connectors[endpoint] = asyncio.create_task(self._keep_connected(endpoint))
        for worker in before - workers.leaving:
            self.moves.end(worker)
        for worker in workers.leaving - before:
            self.hand_overs.end(worker)
            if (client := workers.clients.get(worker)) is not None:
                self.moves.begin(client)
        if before - workers.leaving or known != workers.lacking:
            self.assignments.assign_waiting()

    def assign(
        self,
        request: Request,
        sink: OutputSink,
        deadline_s: float,
        hashes: Sequence[BlockHash] = (),
    ) -> Submission | None:
        """Queue a request for a worker; return None if no connected worker accepts requests.

        ``hashes`` are the hashes of the KV blocks of the request's prompt; empty if unknown.
        ``deadline_s`` is by ``time.monotonic``. Requests that arrive together are routed
        together, the request with the fewest tokens to compute first.
        """
        if not self.workers.is_any_ready:
            return None
        entry = Submission(request, sink, deadline_s)
        if hashes:
            entry.set_hashes(hashes)
        self.assignments.add(entry)
        return entry

    async def wait_change(self, timeout_s: float) -> None:
        """Wait until a stream to a worker opens or ends, at most ``timeout_s`` seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)

    async def stop(self) -> None:
        """End all streams and fail their requests."""
        self.disconnects.stop()
        connectors = list(self._connectors.values())
        self.update([])
        await asyncio.gather(*connectors, return_exceptions=True)

    async def _keep_connected(self, endpoint: AttentionEndpoint) -> None:
        """Keep a stream to a worker open until cancelled: reconnect whenever it ends."""
        clients = self.workers.clients
        while True:
            client = clients[endpoint.name] = EngineClient(self._connect(endpoint), self._events)
            client.set_group(self.workers.groups.get(endpoint.name, endpoint.group))
            announcer = asyncio.create_task(self._notify_when_connected(client))
            end = StreamEnd("the worker left the generation", has_died=False)
            try:
                end = await client.run()
                self.disconnects.note_end(client.worker)
            except Exception as err:
                logger.exception("the stream to %s failed", endpoint.name)
                end = StreamEnd(f"{type(err).__name__}: {err}", has_died=False)
            finally:
                announcer.cancel()
                if clients.get(endpoint.name) is client:  # else ``update`` has handled it
                    del clients[endpoint.name]
                    self._handle_lost_stream(client, end)
            logger.warning("stream to %s ended: %s", endpoint.name, end.reason)
            await asyncio.sleep(_RETRY_S)

    async def _notify_when_connected(self, client: EngineClient) -> None:
        await client.stream.connected.wait()
        self._resolve_disconnect(client.worker, has_died=False)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _handle_lost_stream(self, client: EngineClient, end: StreamEnd) -> None:
        """Assign the requests of an ended stream to other workers, or fail them."""
        self.kv.drop(client.worker)
        self.moves.end(client.worker)
        self.hand_overs.end(client.worker)
        lost = client.take_submissions()
        self.assignments.reassign(self.disconnects.handle_lost_stream(client.worker, lost, end))
        self._notify()

    def _resolve_disconnect(self, worker: str, has_died: bool) -> None:
        """Handle the requests of a lost connection once the worker is known to be alive or dead."""
        continuing = self.disconnects.resolve(worker, has_died)
        if not has_died:
            for entry in (*continuing, *self.assignments.waiting, *self.workers.submissions):
                entry.retract_death(worker)
        self.assignments.reassign(continuing)

    def _handle(self, event: StreamEvent) -> None:
        match event:
            case TokensReceived(entries, now_s):
                self._note_tokens(entries, now_s)
            case RequestEvent(change, client, entry):
                self._handle_change(change, client, entry)
            case MessageReceived(client, KvEvents() as changes):
                if not self.kv.apply(client.worker, changes):
                    client.stream.send(KvResync())
                self.hand_overs.note_blocks(client)
            case MessageReceived(client, Prefetched() | Paused() as message):
                if not self.moves.take(client, message) or isinstance(message, Prefetched):
                    self.hand_overs.take(client, message)

    def _handle_change(
        self, change: RequestChange, client: EngineClient, entry: Submission
    ) -> None:
        match change:
            case RequestChange.WILL_PAUSE:
                self.hand_overs.note_blocks(client)
            case RequestChange.PROMPT_SETTLED:
                self.kv.end_expectation(client.worker, entry.prompt_hashes)
                self.hand_overs.settle(entry, client)
                if entry.must_be_sent_alone:  # the request has ended
                    self.assignments.schedule()
            case RequestChange.PROMPT_COMPUTED:
                if not entry.pauses:  # else the decode worker's blocks will be copied
                    self._copies.note_prompt(entry, client)
                    self.hand_overs.stay(entry, client)
            case RequestChange.RELEASED:
                self.moves.drop(entry)
                self.hand_overs.drop(entry)
                worker = self.workers.clients.get(client.worker)
                if worker is not None and not entry.open_choices:
                    self._copies.note_end(entry, worker)
            case RequestChange.RETURNED:
                self.assignments.requeue(entry)
            case RequestChange.QUEUED_ALONE:
                self.assignments.assign_waiting()
            case RequestChange.SUSPECTED:
                entry.is_suspect = entry.was_suspect = True
                if self._router.must_leave_to_run_alone(entry, client):
                    self.assignments.move(entry, None, 0)
            case RequestChange.KV_PRESSURE:
                self.moves.on_kv_pressure(entry, client)

    def _note_tokens(self, entries: Sequence[Submission], now_s: float) -> None:
        for entry in entries:
            if entry.last_token_s:
                self.pauses.token(entry.last_token_s, now_s)
            entry.last_token_s = now_s
            self.moves.note_token(entry)
