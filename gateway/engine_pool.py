"""All streams of this replica: one to each attention worker of the current generation.

The requests of a stream that ends go on at another worker, with their output so far. While there
is none they wait here, each up to its deadline: then its ``Generation`` gives it up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence

from cluster.errors import NotReadyError, PoisonousRequestError
from gateway.cluster_view import AttentionEndpoint
from gateway.engine_client import PING_S, SILENCE_LIMIT_S, EngineClient
from gateway.router import RoutingPolicy, WorkerLoad, pick_worker
from gateway.submission import OutputSink, Submission
from workers.request import Request

logger = logging.getLogger(__name__)

_RETRY_S = 0.2
_REFUSED_RETRY_S = 0.1
"""Time before a request that a worker handed back may go to the same worker again."""


class EnginePool:
    """Keeps the streams and hands requests to them.

    Args:
        token: the cluster token.
        gateway: name of this replica.
        policy: how a worker is picked.
        silence_limit_s: see ``EngineClient``.
        ping_s: see ``EngineClient``.
    """

    def __init__(
        self,
        token: str,
        gateway: str,
        policy: RoutingPolicy = RoutingPolicy.LEAST_LOADED,
        *,
        silence_limit_s: float = SILENCE_LIMIT_S,
        ping_s: float = PING_S,
    ) -> None:
        self._token = token
        self._gateway = gateway
        self._policy = policy
        self._silence_limit_s = silence_limit_s
        self._ping_s = ping_s
        self._clients: dict[str, EngineClient] = {}
        self._keepers: dict[AttentionEndpoint, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._turn = 0
        self._waiting: list[Submission] = []
        self._is_stopping = False
        self.on_resubmit: Callable[[Submission], None] = lambda entry: None
        """Called whenever a request goes to another worker."""

    @property
    def clients(self) -> list[EngineClient]:
        """Streams that are open, by worker name."""
        ready = (client for client in self._clients.values() if client.hello is not None)
        return sorted(ready, key=lambda client: client.worker)

    def update(self, endpoints: Sequence[AttentionEndpoint]) -> None:
        """Open streams to new workers, and drop those that are not listed any more."""
        for gone in set(self._keepers) - set(endpoints):
            logger.info("%s left the generation: stream dropped", gone.name)
            self._keepers.pop(gone).cancel()
            if (client := self._clients.pop(gone.name, None)) is not None:
                self._lose(client, "the worker left the generation")
        for endpoint in endpoints:
            if endpoint not in self._keepers:
                self._keepers[endpoint] = asyncio.create_task(self._keep(endpoint))

    def assign(self, request: Request, sink: OutputSink, deadline_s: float) -> Submission | None:
        """Hand a request to a worker; None while no stream is open.

        ``deadline_s`` is the ``time.monotonic`` up to which it is tried.
        """
        client = self._pick()
        if client is None:
            return None
        entry = Submission(request, sink, deadline_s)
        client.submit(entry)
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

    def _pick(self, avoid: str = "") -> EngineClient | None:
        """The worker for a request; ``avoid`` only where there is no other."""
        clients = {client.worker: client for client in self.clients}
        if len(clients) > 1:
            clients.pop(avoid, None)
        loads = [
            WorkerLoad(name=name, outstanding_tokens=client.outstanding_tokens)
            for name, client in clients.items()
        ]
        picked = pick_worker(loads, self._policy, self._turn)
        if picked is None:
            return None
        self._turn += 1
        return clients[picked.name]

    async def _keep(self, endpoint: AttentionEndpoint) -> None:
        """One stream after the other to the same worker, until it is not listed any more."""
        while True:
            client = EngineClient(
                endpoint.name,
                endpoint.address,
                self._token,
                self._gateway,
                self._take_back,
                silence_limit_s=self._silence_limit_s,
                ping_s=self._ping_s,
            )
            self._clients[endpoint.name] = client
            announcer = asyncio.create_task(self._announce(client))
            reason = "the worker left the generation"
            try:
                reason = await client.run()
            finally:
                announcer.cancel()
                if self._clients.get(endpoint.name) is client:
                    del self._clients[endpoint.name]
                self._lose(client, reason)
            logger.warning("stream to %s ended: %s", endpoint.name, reason)
            await asyncio.sleep(_RETRY_S)

    async def _announce(self, client: EngineClient) -> None:
        await client.connected.wait()
        self._place_waiting()
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _lose(self, client: EngineClient, reason: str) -> None:
        """A stream is of no use any more: others go on with its requests."""
        for entry in client.take_submissions():
            name = entry.request.request_id
            if self._is_stopping:
                entry.sink.fail(NotReadyError(f"the gateway ends ({reason})", "not_ready", 1.0))
                continue
            logger.warning("request %s was lost with %s: %s", name, client.worker, reason)
            if entry.is_alone:
                error = f"a third worker in a row was lost with request {name}: {reason}"
                entry.close()
                entry.sink.fail(PoisonousRequestError(error))
                continue
            entry.lose()
            self._waiting.append(entry)
        self._place_waiting()
        self._notify()

    def _take_back(self, entry: Submission, reason: str) -> None:
        """A worker will not finish a request that another one can."""
        logger.info("request %s was handed back: %s", entry.request.request_id, reason)
        self._waiting.append(entry)
        has_other = entry.num_returns == 1 and len(self.clients) > 1
        delay_s = 0.0 if has_other else _REFUSED_RETRY_S
        asyncio.get_running_loop().call_later(delay_s, self._place_waiting)

    def _place_waiting(self) -> None:
        """Send the requests that wait for a worker to the ones there are now."""
        waiting, self._waiting = self._waiting, []
        now_s = time.monotonic()
        for entry in waiting:
            if not entry.is_waiting or now_s >= entry.deadline_s:
                continue
            client = self._pick(entry.last_worker)
            if client is None:
                self._waiting.append(entry)
                continue
            entry.again(now_s)
            client.submit(entry)
            self.on_resubmit(entry)
